// Compiles the inner loops for each instruction set and picks the best one that this processor has.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstring>
#include <initializer_list>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace generic {
#include "kernels.inl"
#include "sums.inl"
static const Kernels table{"generic", row_stats, row_grads, ema, byte_sum};
}  // namespace generic

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ADVGAME_X86 1

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "kernels.inl"
#include "sums.inl"
static const Kernels table{"avx2", row_stats, row_grads, ema, byte_sum};
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define ADVGAME_AVX512 1  // g++ sets its own macros by the command line alone, whatever the pragma says
namespace avx512 {
#include "kernels.inl"
#include "sums.inl"
static const Kernels table{"avx512", row_stats, row_grads, ema, byte_sum};
}  // namespace avx512
#undef ADVGAME_AVX512
#pragma GCC pop_options
#endif

static bool runs(const char* name) {
#ifdef ADVGAME_X86
    __builtin_cpu_init();
    if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!std::strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return !std::strcmp(name, "generic");
}

const Kernels* find_kernels(const char* name) {
    if (!runs(name)) return nullptr;
#ifdef ADVGAME_X86
    if (!std::strcmp(name, "avx512")) return &avx512::table;
    if (!std::strcmp(name, "avx2")) return &avx2::table;
#endif
    return &generic::table;
}

const Kernels* best_kernels() {
    for (const char* name : {"avx512", "avx2", "generic"})
        if (const Kernels* found = find_kernels(name)) return found;
    return &generic::table;
}
