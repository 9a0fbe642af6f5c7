// The CUDA runtime, found when it is first needed: nothing of CUDA is here at build time.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
//
// Types and signatures are those of cuda_runtime_api.h and driver_types.h, which are the same in CUDA 12 and 13 for every call
// below. cudaGraphInstantiate is not (five arguments before 12), hence cudaGraphInstantiateWithFlags, which is there since 11.4;
// cudaGraphAddNode changed in 13, hence the calls for one kind of node each.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace cuda {

using Error = int;                         // cudaError_t; 0: success
struct IpcHandle { char reserved[64]; };   // cudaIpcMemHandle_t
struct Pos { size_t x, y, z; };
struct PitchedPtr { void* ptr; size_t pitch, xsize, ysize; };
struct Extent { size_t width, height, depth; };
struct Memcpy3D {                          // cudaMemcpy3DParms
    void* srcArray;
    Pos srcPos;
    PitchedPtr srcPtr;
    void* dstArray;
    Pos dstPos;
    PitchedPtr dstPtr;
    Extent extent;
    int kind;
};
using Graph = struct GraphOf*;
using Node = struct NodeOf*;
using Exec = struct ExecOf*;
using Stream = struct StreamOf*;

constexpr int kDefault = 4;                // cudaMemcpyDefault: the addresses say which device
constexpr unsigned kLazyPeerAccess = 1;    // cudaIpcMemLazyEnablePeerAccess
constexpr Error kPeerAccessAlreadyEnabled = 704;

// One loaded library. Every member is the call of that name without its `cuda`.
struct Runtime {
    explicit Runtime(const std::string& path);  // empty: torch's own, else the system's. std::runtime_error: none, too old
    Runtime(const Runtime&) = delete;
    Runtime& operator=(const Runtime&) = delete;
    ~Runtime();

    std::string path;

    Error (*RuntimeGetVersion)(int*);
    const char* (*GetErrorString)(Error);
    Error (*GetLastError)();
    Error (*GetDevice)(int*);
    Error (*SetDevice)(int);
    Error (*DeviceCanAccessPeer)(int*, int, int);
    Error (*DeviceEnablePeerAccess)(int, unsigned);
    Error (*Malloc)(void**, size_t);
    Error (*Free)(void*);
    Error (*IpcGetMemHandle)(IpcHandle*, void*);
    Error (*IpcOpenMemHandle)(void**, IpcHandle, unsigned);
    Error (*IpcCloseMemHandle)(void*);
    Error (*GraphCreate)(Graph*, unsigned);
    Error (*GraphAddMemcpyNode)(Node*, Graph, const Node*, size_t, const Memcpy3D*);
    Error (*GraphAddChildGraphNode)(Node*, Graph, const Node*, size_t, Graph);
    Error (*GraphInstantiateWithFlags)(Exec*, Graph, unsigned long long);
    Error (*GraphLaunch)(Exec, Stream);
    Error (*GraphExecDestroy)(Exec);
    Error (*GraphDestroy)(Graph);

    // std::runtime_error "cudaMalloc: out of memory (2)" unless `error` is 0. The runtime forgets it: the next call of somebody
    // else in this process must not find it.
    void check(Error error, const char* call) const;

  private:
    void* library_ = nullptr;
};

// Makes a device the current one for a scope.
class OnDevice {
  public:
    OnDevice(const Runtime& runtime, int device);
    ~OnDevice();

  private:
    const Runtime& runtime_;
    int before_ = 0;
};

// Whether kernels and copies of `device` may reach the memory of `peer`; they may from here on.
bool reaches(const Runtime& runtime, int device, int peer);

// Device memory: allocated by us with cudaMalloc, which is what CUDA IPC can export, or opened from a handle.
class Memory {
  public:
    static std::unique_ptr<Memory> allocate(std::shared_ptr<Runtime> runtime, int device, size_t bytes);
    static std::unique_ptr<Memory> open(std::shared_ptr<Runtime> runtime, int device, const std::string& handle, size_t bytes);
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory();

    std::string handle() const;  // 64 bytes, for another process

    void* const data;
    const size_t bytes;
    const int device;

  private:
    Memory(std::shared_ptr<Runtime> runtime, int device, void* data, size_t bytes, bool opened)
        : data(data), bytes(bytes), device(device), runtime_(std::move(runtime)), opened_(opened) {}

    std::shared_ptr<Runtime> runtime_;
    const bool opened_;
};

}  // namespace cuda
