// See copies.h.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#include "copies.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "../parallel.h"

namespace {

constexpr size_t kUnrolled = 1024;        // most pieces of one box
constexpr size_t kPitch = (1u << 31) - 1;  // largest distance of rows that CUDA takes
constexpr size_t kPart = 1u << 30;        // bytes of one run that a node copies

struct Axis { int64_t size, to, from; };  // distances in bytes

// The box's axes from the outermost to the innermost, in bytes; neighbours that are one run on both sides are one axis.
std::vector<Axis> axes_of(const Box& box) {
    if (box.shape.size() != box.to_stride.size() || box.shape.size() != box.from_stride.size())
        throw std::invalid_argument("a copy's shape and strides have different lengths");
    const int64_t item = (int64_t)box.item;
    std::vector<Axis> axes;
    for (size_t i = 0; i < box.shape.size(); ++i)
        if (box.shape[i] != 1) axes.push_back({box.shape[i], box.to_stride[i] * item, box.from_stride[i] * item});
    std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.to > b.to; });
    std::vector<Axis> merged;
    for (const Axis& axis : axes) {
        if (!merged.empty() && merged.back().to == axis.to * axis.size && merged.back().from == axis.from * axis.size)
            merged.back() = {merged.back().size * axis.size, axis.to, axis.from};
        else
            merged.push_back(axis);
    }
    return merged;
}

// Rows without their places; nothing where the elements of a run do not lie side by side.
std::optional<std::vector<Rows>> rows_of(const Box& box) {
    std::vector<Axis> axes = axes_of(box);
    const int64_t item = (int64_t)box.item;
    std::vector<Rows> rows{{reinterpret_cast<char*>(box.to), reinterpret_cast<const char*>(box.from), box.item, 1, 0, 0, 0}};
    if (std::any_of(axes.begin(), axes.end(), [](const Axis& axis) { return axis.size == 0; })) return std::vector<Rows>{};
    if (axes.empty()) return rows;
    if (axes.back().to != item || axes.back().from != item) return std::nullopt;
    Rows& one = rows[0];
    one.width = (size_t)(axes.back().size * item);
    axes.pop_back();
    const auto pitch = [&](int64_t bytes) { return bytes >= (int64_t)one.width && bytes <= (int64_t)kPitch; };
    if (!axes.empty() && pitch(axes.back().to) && pitch(axes.back().from)) {
        one.rows = (size_t)axes.back().size;
        one.to_pitch = (size_t)axes.back().to;
        one.from_pitch = (size_t)axes.back().from;
        axes.pop_back();
    }
    for (const Axis& axis : axes) {
        if ((size_t)axis.size > kUnrolled / rows.size()) return std::nullopt;
        std::vector<Rows> more;
        for (const Rows& row : rows)
            for (int64_t i = 0; i < axis.size; ++i) {
                more.push_back(row);
                more.back().to += i * axis.to;
                more.back().from += i * axis.from;
            }
        rows = std::move(more);
    }
    return rows;
}

void copy_part(const Rows& part, size_t begin, size_t end) {
    while (begin < end) {
        const size_t row = begin / part.width, inside = begin % part.width;
        const size_t n = std::min(part.width - inside, end - begin);
        std::memcpy(part.to + row * part.to_pitch + inside, part.from + row * part.from_pitch + inside, n);
        begin += n;
    }
}

}  // namespace

Copies::Copies(const std::vector<Box>& boxes) {
    for (size_t i = 0; i < boxes.size(); ++i) {
        const auto found = rows_of(boxes[i]);
        if (!found) {
            left.push_back(i);
            continue;
        }
        for (Rows row : *found) {
            row.first = bytes;
            bytes += row.width * row.rows;
            rows.push_back(row);
        }
    }
}

void Copies::run(int threads) const {
    if (!bytes) return;
    // one range over all bytes, so that threads share the work whatever the sizes of the copies are
    parallel_for((int64_t)bytes, 1 << 18, threads, [this](int64_t begin, int64_t end) {
        const auto after = [](int64_t place, const Rows& row) { return (size_t)place < row.first; };
        auto row = std::upper_bound(rows.begin(), rows.end(), begin, after) - 1;
        for (; row != rows.end() && (int64_t)row->first < end; ++row) {
            const int64_t first = (int64_t)row->first, size = (int64_t)(row->width * row->rows);
            copy_part(*row, (size_t)(std::max(begin, first) - first), (size_t)(std::min(end - first, size)));
        }
    });
}

PublishGraph::PublishGraph(std::shared_ptr<cuda::Runtime> runtime, int device) : runtime_(std::move(runtime)), device_(device) {
    const cuda::OnDevice on(*runtime_, device_);
    runtime_->check(runtime_->GraphCreate(&graph_, 0), "cudaGraphCreate");
}

PublishGraph::~PublishGraph() {
    if (exec_) runtime_->GraphExecDestroy(exec_);
    if (graph_) runtime_->GraphDestroy(graph_);
}

void PublishGraph::then(std::vector<cuda::Node> made) {
    nodes_ += made.size();
    if (!made.empty()) last_ = std::move(made);
}

void PublishGraph::then_graph(uintptr_t captured) {
    if (exec_) throw std::logic_error("the graph has been launched already");
    const cuda::OnDevice on(*runtime_, device_);
    cuda::Node node;
    runtime_->check(
        runtime_->GraphAddChildGraphNode(&node, graph_, last_.data(), last_.size(), reinterpret_cast<cuda::Graph>(captured)),
        "cudaGraphAddChildGraphNode");
    then({node});
}

cuda::Node PublishGraph::copy_node(char* to, const char* from, size_t width, size_t rows, size_t to_pitch, size_t from_pitch) {
    cuda::Memcpy3D copy{};
    copy.srcPtr = {const_cast<char*>(from), rows == 1 ? width : from_pitch, width, rows};
    copy.dstPtr = {to, rows == 1 ? width : to_pitch, width, rows};
    copy.extent = {width, rows, 1};
    copy.kind = cuda::kDefault;
    cuda::Node node;
    runtime_->check(runtime_->GraphAddMemcpyNode(&node, graph_, last_.data(), last_.size(), &copy), "cudaGraphAddMemcpyNode");
    return node;
}

void PublishGraph::then_copies(const Copies& copies) {
    if (exec_) throw std::logic_error("the graph has been launched already");
    const cuda::OnDevice on(*runtime_, device_);
    std::vector<cuda::Node> made;
    for (const Rows& row : copies.rows) {
        if (row.rows > 1) {
            made.push_back(copy_node(row.to, row.from, row.width, row.rows, row.to_pitch, row.from_pitch));
            continue;
        }
        for (size_t at = 0; at < row.width; at += kPart)
            made.push_back(copy_node(row.to + at, row.from + at, std::min(kPart, row.width - at), 1, 0, 0));
    }
    then(std::move(made));
}

void PublishGraph::launch(uintptr_t stream) {
    if (!nodes_) return;
    const cuda::OnDevice on(*runtime_, device_);
    if (!exec_) runtime_->check(runtime_->GraphInstantiateWithFlags(&exec_, graph_, 0), "cudaGraphInstantiate");
    runtime_->check(runtime_->GraphLaunch(exec_, reinterpret_cast<cuda::Stream>(stream)), "cudaGraphLaunch");
}
