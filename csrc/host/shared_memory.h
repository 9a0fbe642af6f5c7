// Memory of two processes: a file without a name (memfd), mapped by both sides.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>

// A mapping, and for whoever made the file also its descriptor. Unmapped when the last tensor over it is gone.
class SharedMemory {
  public:
    explicit SharedMemory(size_t bytes);                // zeros
    SharedMemory(const std::string& path, size_t bytes);  // somebody else's, through /proc
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    ~SharedMemory();

    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }
    int descriptor() const { return descriptor_; }  // -1: closed, or never had
    void close_file();                              // nobody can open it any more; mappings stay

  private:
    void map(int descriptor);

    void* data_ = nullptr;
    size_t bytes_, mapped_;
    int descriptor_ = -1;
};
