// Python bindings of the CPU kernels: addresses in, nothing out; the GIL is free while they work.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace py = pybind11;

static const Kernels* active = best_kernels();

static DType dtype_of(int code) {
    if (code != kFloat32 && code != kBFloat16) throw std::invalid_argument("dtype code must be 0 or 1");
    return (DType)code;
}

template <class T>
static T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// About 64 KiB of logits a thread at the least: below that starting the thread costs more than the work.
static int64_t row_grain(int64_t vocab) { return 1 + 16384 / (vocab > 0 ? vocab : 1); }

static void row_stats(uintptr_t logits, int dtype, int64_t rows, int64_t vocab, int64_t stride, uintptr_t labels,
                      double temperature, double softcap, uintptr_t logps, uintptr_t entropy, uintptr_t lse,
                      int threads) {
    Rows job{at<void>(logits), dtype_of(dtype), nullptr, kFloat32, vocab, stride, 0, at<const int64_t>(labels),
             1.0 / temperature, (float)softcap, at<float>(logps), at<float>(entropy), at<double>(lse),
             nullptr, nullptr, nullptr};
    parallel_for(rows, row_grain(vocab), threads,
                 [&job](int64_t begin, int64_t end) { active->row_stats(job, begin, end); });
}

static void row_grads(uintptr_t logits, int dtype, uintptr_t grads, int grad_dtype, int64_t rows, int64_t vocab,
                      int64_t stride, int64_t grad_stride, uintptr_t labels, double temperature, double softcap, uintptr_t entropy, uintptr_t lse,
                      uintptr_t d_logps, uintptr_t d_entropy, uintptr_t d_lse, int threads) {
    Rows job{at<void>(logits), dtype_of(dtype), at<void>(grads), dtype_of(grad_dtype), vocab, stride, grad_stride,
             at<const int64_t>(labels),
             1.0 / temperature, (float)softcap, nullptr, at<float>(entropy), at<double>(lse),
             at<const float>(d_logps), at<const float>(d_entropy), at<const float>(d_lse)};
    parallel_for(rows, row_grain(vocab), threads,
                 [&job](int64_t begin, int64_t end) { active->row_grads(job, begin, end); });
}

using EmaEntry = std::tuple<uintptr_t, int, uintptr_t, int, uintptr_t, int, uintptr_t, int64_t>;

// A seed's two keys: neighbouring seeds get keys without a pattern (splitmix64's finaliser).
static EmaCall ema_call(double step, uint64_t seed) {
    uint64_t x = seed + 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return {(float)step, {(uint32_t)x, (uint32_t)(x >> 32)}};
}

static void ema_update(const std::vector<EmaEntry>& entries, double step, uint64_t seed, int threads) {
    std::vector<EmaTensor> tensors;
    int64_t total = 0;
    for (const auto& [shadow, shadow_dtype, param, param_dtype, publish, publish_dtype, kept, numel] : entries) {
        tensors.push_back({at<void>(shadow), dtype_of(shadow_dtype), at<const void>(param), dtype_of(param_dtype),
                           at<void>(publish), dtype_of(publish_dtype), at<uint16_t>(kept), numel, total});
        total += numel;
    }
    const EmaCall call = ema_call(step, seed);
    // One range over the whole model, so that threads share the work whatever the sizes of the tensors are.
    parallel_for(total, 1 << 16, threads, [&](int64_t begin, int64_t end) {
        for (const EmaTensor& tensor : tensors) {
            const int64_t from = std::max(begin - tensor.first, int64_t{0}), to = std::min(end - tensor.first, tensor.numel);
            if (from < to) active->ema(tensor, from, to, call);
        }
    });
}

using SumEntry = std::pair<uintptr_t, int64_t>;

// sums[i]: of the bytes of entry i.
static void byte_sums(const std::vector<SumEntry>& entries, uintptr_t sums, int threads) {
    int64_t total = 0;
    for (const auto& entry : entries) total += entry.second;
    std::vector<std::atomic<uint64_t>> found(entries.size());
    parallel_for(total, 1 << 18, threads, [&](int64_t begin, int64_t end) {
        int64_t first = 0;
        for (size_t i = 0; i < entries.size(); first += entries[i++].second) {
            const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, entries[i].second);
            if (from < to) found[i] += active->byte_sum(at<const uint8_t>(entries[i].first), from, to);
        }
    });
    for (size_t i = 0; i < entries.size(); ++i) at<uint64_t>(sums)[i] = found[i];
}

static void use_isa(const std::string& name) {
    const Kernels* found = find_kernels(name.c_str());
    if (!found) throw std::invalid_argument("this processor cannot run " + name);
    active = found;
}

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of advgame_kernels; called through advgame_kernels.native only.";
    const auto free = py::call_guard<py::gil_scoped_release>();
    m.def("row_stats", &row_stats, free);
    m.def("row_grads", &row_grads, free);
    m.def("ema_update", &ema_update, free);
    m.def("byte_sums", &byte_sums, free);
    m.def("isa", [] { return std::string(active->name); }, "The instruction set in use.");
    m.def("use_isa", &use_isa, "Use 'avx512', 'avx2' or 'generic'; for tests.");
}
