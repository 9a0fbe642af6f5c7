// See cudart.h.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#include "cudart.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <stdexcept>

namespace cuda {

namespace {

// The path of a CUDA runtime that this process has loaded already, as torch has: two of them would not know each other's memory.
std::string loaded() {
    std::string found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* to) {
            const char* name = std::strrchr(info->dlpi_name, '/');
            name = name ? name + 1 : info->dlpi_name;
            if (std::strncmp(name, "libcudart", 9) != 0) return 0;
            *static_cast<std::string*>(to) = info->dlpi_name;
            return 1;
        },
        &found);
    return found;
}

template <class Function>
void find(void* library, const std::string& path, const char* name, Function& into) {
    into = reinterpret_cast<Function>(dlsym(library, name));
    if (!into) throw std::runtime_error(path + " has no " + name + "; CUDA 11.4 or newer is needed");
}

}  // namespace

Runtime::Runtime(const std::string& wanted) : path(wanted.empty() ? loaded() : wanted) {
    if (!path.empty()) library_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    for (const char* name : {"libcudart.so.13", "libcudart.so.12", "libcudart.so"}) {
        if (library_ || !wanted.empty()) break;
        library_ = dlopen(path.assign(name).c_str(), RTLD_NOW | RTLD_LOCAL);
    }
    if (!library_) {
        const char* said = dlerror();
        throw std::runtime_error(std::string("no CUDA runtime: ") + (said ? said : "libcudart is nowhere"));
    }
    try {
#define FIND(name) find(library_, path, "cuda" #name, name)
        FIND(RuntimeGetVersion), FIND(GetErrorString), FIND(GetLastError), FIND(GetDevice), FIND(SetDevice);
        FIND(DeviceCanAccessPeer), FIND(DeviceEnablePeerAccess), FIND(Malloc), FIND(Free);
        FIND(IpcGetMemHandle), FIND(IpcOpenMemHandle), FIND(IpcCloseMemHandle);
        FIND(GraphCreate), FIND(GraphAddMemcpyNode), FIND(GraphAddChildGraphNode), FIND(GraphInstantiateWithFlags);
        FIND(GraphLaunch), FIND(GraphExecDestroy), FIND(GraphDestroy);
#undef FIND
    } catch (...) {
        dlclose(library_);
        throw;
    }
}

Runtime::~Runtime() { dlclose(library_); }

void Runtime::check(Error error, const char* call) const {
    if (error == 0) return;
    GetLastError();
    throw std::runtime_error(std::string(call) + ": " + GetErrorString(error) + " (" + std::to_string(error) + ")");
}

OnDevice::OnDevice(const Runtime& runtime, int device) : runtime_(runtime) {
    runtime_.check(runtime_.GetDevice(&before_), "cudaGetDevice");
    runtime_.check(runtime_.SetDevice(device), "cudaSetDevice");
}

OnDevice::~OnDevice() { runtime_.SetDevice(before_); }

bool reaches(const Runtime& runtime, int device, int peer) {
    if (device == peer) return true;
    int can = 0;
    runtime.check(runtime.DeviceCanAccessPeer(&can, device, peer), "cudaDeviceCanAccessPeer");
    if (!can) return false;
    const OnDevice on(runtime, device);
    const Error error = runtime.DeviceEnablePeerAccess(peer, 0);
    if (error == kPeerAccessAlreadyEnabled)  // by torch, as a rule
        runtime.GetLastError();
    else
        runtime.check(error, "cudaDeviceEnablePeerAccess");
    return true;
}

std::unique_ptr<Memory> Memory::allocate(std::shared_ptr<Runtime> runtime, int device, size_t bytes) {
    const OnDevice on(*runtime, device);
    void* data = nullptr;
    runtime->check(runtime->Malloc(&data, bytes), "cudaMalloc");
    return std::unique_ptr<Memory>(new Memory(runtime, device, data, bytes, false));
}

std::unique_ptr<Memory> Memory::open(std::shared_ptr<Runtime> runtime, int device, const std::string& handle, size_t bytes) {
    IpcHandle found;
    if (handle.size() != sizeof found)
        throw std::invalid_argument("a handle has 64 bytes, this one " + std::to_string(handle.size()));
    std::memcpy(&found, handle.data(), sizeof found);
    const OnDevice on(*runtime, device);
    void* data = nullptr;
    runtime->check(runtime->IpcOpenMemHandle(&data, found, kLazyPeerAccess), "cudaIpcOpenMemHandle");
    return std::unique_ptr<Memory>(new Memory(runtime, device, data, bytes, true));
}

// Errors are nobody's to handle here: at the end of a process the driver may be gone already, and with it the memory.
Memory::~Memory() {
    int before = 0;
    if (runtime_->GetDevice(&before) != 0 || runtime_->SetDevice(device) != 0) return;
    if ((opened_ ? runtime_->IpcCloseMemHandle(data) : runtime_->Free(data)) != 0) runtime_->GetLastError();
    runtime_->SetDevice(before);
}

std::string Memory::handle() const {
    const OnDevice on(*runtime_, device);
    IpcHandle made;
    runtime_->check(runtime_->IpcGetMemHandle(&made, data), "cudaIpcGetMemHandle");
    return {made.reserved, sizeof made.reserved};
}

}  // namespace cuda
