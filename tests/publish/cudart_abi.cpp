// Compares what csrc/host/cudart.h says of the CUDA runtime with CUDA's own headers: sizes, places, and for every call the number
// and the sizes of its arguments. Compiled by test_host_cuda.py; nothing runs.
#include <cuda_runtime_api.h>

#include <cstddef>

#include "cudart.h"

template <class T>
constexpr size_t size = sizeof(T);
template <>
constexpr size_t size<void> = 0;

template <class R, class... A, class S, class... B>
constexpr bool alike(R (*)(A...), S (*)(B...)) {
    if constexpr (sizeof...(A) == sizeof...(B))
        return size<R> == size<S> && ((sizeof(A) == sizeof(B)) && ...);
    else
        return false;
}

#define SAME(name) static_assert(alike(decltype(cuda::Runtime::name){}, static_cast<decltype(&cuda##name)>(nullptr)), #name)
SAME(RuntimeGetVersion);
SAME(GetErrorString);
SAME(GetLastError);
SAME(GetDevice);
SAME(SetDevice);
SAME(DeviceCanAccessPeer);
SAME(DeviceEnablePeerAccess);
SAME(Free);
static_assert(alike(decltype(cuda::Runtime::Malloc){}, static_cast<cudaError_t (*)(void**, size_t)>(cudaMalloc)), "Malloc");
SAME(IpcGetMemHandle);
SAME(IpcOpenMemHandle);
SAME(IpcCloseMemHandle);
SAME(GraphCreate);
SAME(GraphAddMemcpyNode);
SAME(GraphAddChildGraphNode);
SAME(GraphInstantiateWithFlags);
SAME(GraphLaunch);
SAME(GraphExecDestroy);
SAME(GraphDestroy);

#define AT(mine, theirs, member) static_assert(offsetof(cuda::mine, member) == offsetof(theirs, member), #theirs "." #member)
static_assert(sizeof(cuda::Memcpy3D) == sizeof(cudaMemcpy3DParms));
AT(Memcpy3D, cudaMemcpy3DParms, srcArray);
AT(Memcpy3D, cudaMemcpy3DParms, srcPtr);
AT(Memcpy3D, cudaMemcpy3DParms, dstArray);
AT(Memcpy3D, cudaMemcpy3DParms, dstPtr);
AT(Memcpy3D, cudaMemcpy3DParms, extent);
AT(Memcpy3D, cudaMemcpy3DParms, kind);
AT(PitchedPtr, cudaPitchedPtr, ptr);
AT(PitchedPtr, cudaPitchedPtr, pitch);
AT(Extent, cudaExtent, width);
AT(Extent, cudaExtent, height);
AT(Extent, cudaExtent, depth);
static_assert(sizeof(cuda::IpcHandle) == sizeof(cudaIpcMemHandle_t) && alignof(cuda::IpcHandle) == alignof(cudaIpcMemHandle_t));
static_assert(cuda::kDefault == cudaMemcpyDefault && cuda::kLazyPeerAccess == cudaIpcMemLazyEnablePeerAccess);
static_assert(cuda::kPeerAccessAlreadyEnabled == cudaErrorPeerAccessAlreadyEnabled);
