// Many copies as one: strided boxes become rows of bytes once, and are then copied by threads, or by a CUDA graph.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cudart.h"

// `rows` runs of `width` bytes each, at these distances.
struct Rows {
    char* to;
    const char* from;
    size_t width, rows, to_pitch, from_pitch;
    size_t first;  // number of its first byte among all
};

// A copy between tensors of one dtype: addresses, and strides in elements.
struct Box {
    uintptr_t to, from;
    size_t item;
    std::vector<int64_t> shape, to_stride, from_stride;
};

class Copies {
  public:
    explicit Copies(const std::vector<Box>& boxes);

    void run(int threads) const;  // on the CPU

    std::vector<Rows> rows;
    std::vector<size_t> left;  // numbers of the boxes that are no rows of bytes; not copied here
    size_t bytes = 0;
};

// What one publish does on the GPU as one CUDA graph: graphs that were captured, and copies, each after the one before it.
class PublishGraph {
  public:
    PublishGraph(std::shared_ptr<cuda::Runtime> runtime, int device);
    PublishGraph(const PublishGraph&) = delete;
    PublishGraph& operator=(const PublishGraph&) = delete;
    ~PublishGraph();

    void then_graph(uintptr_t captured);  // a cudaGraph_t; it is cloned
    void then_copies(const Copies& copies);
    void launch(uintptr_t stream);        // a cudaStream_t of the device
    size_t nodes() const { return nodes_; }

  private:
    void then(std::vector<cuda::Node> made);
    cuda::Node copy_node(char* to, const char* from, size_t width, size_t rows, size_t to_pitch, size_t from_pitch);

    std::shared_ptr<cuda::Runtime> runtime_;
    const int device_;
    cuda::Graph graph_ = nullptr;
    cuda::Exec exec_ = nullptr;
    std::vector<cuda::Node> last_;
    size_t nodes_ = 0;
};
