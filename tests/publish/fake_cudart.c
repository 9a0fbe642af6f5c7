/* A CUDA runtime of host memory, for tests without a GPU: the calls that csrc/host/ makes, with the signatures of
 * cuda_runtime_api.h. Memory is a memfd, so that another process can open a handle; a graph's nodes run when it is
 * launched, and a node before those that it depends on is an error. Devices 0 and 1 reach each other, 2 reaches nobody. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef REAL_HEADERS /* the compiler then compares every definition below with CUDA's own declaration */
#include <cuda_runtime_api.h>
#else
typedef int cudaError_t;
typedef struct { char reserved[64]; } cudaIpcMemHandle_t;
struct cudaPos { size_t x, y, z; };
struct cudaPitchedPtr { void *ptr; size_t pitch, xsize, ysize; };
struct cudaExtent { size_t width, height, depth; };
struct cudaMemcpy3DParms {
    void *srcArray; struct cudaPos srcPos; struct cudaPitchedPtr srcPtr;
    void *dstArray; struct cudaPos dstPos; struct cudaPitchedPtr dstPtr;
    struct cudaExtent extent; int kind;
};
typedef struct CUgraph_st *cudaGraph_t;
typedef struct CUgraphNode_st *cudaGraphNode_t;
typedef struct CUgraphExec_st *cudaGraphExec_t;
typedef struct CUstream_st *cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidDevice = 101,
       cudaErrorPeerAccessAlreadyEnabled = 704, cudaErrorMapBufferObjectFailed = 205, cudaMemcpyDefault = 4 };
#endif

#define DEVICES 3
#define LARGEST ((size_t)1 << 32)
static int device, enabled[DEVICES][DEVICES], last, allocations;

static cudaError_t fail(cudaError_t error) { last = error; return error; }

cudaError_t cudaRuntimeGetVersion(int *version) { *version = 12080; return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory"
         : error == cudaErrorInvalidDevice ? "invalid device ordinal"
         : error == cudaErrorMapBufferObjectFailed ? "mapping of buffer object failed" : "invalid argument";
}
cudaError_t cudaGetLastError(void) { cudaError_t found = last; last = 0; return found; }
cudaError_t cudaGetDevice(int *found) { *found = device; return cudaSuccess; }
cudaError_t cudaSetDevice(int wanted) {
    if (wanted < 0 || wanted >= DEVICES) return fail(cudaErrorInvalidDevice);
    device = wanted;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) { *can = from < 2 && to < 2; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned int flags) {
    if (flags) return fail(cudaErrorInvalidValue);
    if (enabled[device][peer]++) return fail(cudaErrorPeerAccessAlreadyEnabled);
    return cudaSuccess;
}

struct block { void *data; size_t size; int file; struct block *next; };
static struct block *blocks;

static cudaError_t map(void **to, int file, size_t size) {
    struct block *made = malloc(sizeof *made);
    void *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (data == MAP_FAILED) return fail(cudaErrorMapBufferObjectFailed);
    *made = (struct block){data, size, file, blocks};
    blocks = made;
    *to = data;
    ++allocations;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void **to, size_t size) {
    int file;
    if (size >= LARGEST) return fail(cudaErrorMemoryAllocation);
    file = memfd_create("fake-gpu", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, (off_t)size)) return fail(cudaErrorMemoryAllocation);
    return map(to, file, size);
}
static cudaError_t release(void *data) {
    for (struct block **at = &blocks; *at; at = &(*at)->next)
        if ((*at)->data == data) {
            struct block *gone = *at;
            munmap(gone->data, gone->size);
            close(gone->file);
            *at = gone->next;
            free(gone);
            --allocations;
            return cudaSuccess;
        }
    return fail(cudaErrorInvalidValue);
}
cudaError_t cudaFree(void *data) { return release(data); }
cudaError_t cudaIpcCloseMemHandle(void *data) { return release(data); }
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *data) {
    for (struct block *at = blocks; at; at = at->next)
        if (at->data == data) {
            memset(handle, 0, sizeof *handle);
            snprintf(handle->reserved, sizeof handle->reserved, "%d %d %zu", (int)getpid(), at->file, at->size);
            return cudaSuccess;
        }
    return fail(cudaErrorInvalidValue);
}
cudaError_t cudaIpcOpenMemHandle(void **to, cudaIpcMemHandle_t handle, unsigned int flags) {
    int pid, number, file;
    size_t size;
    char path[64];
    if (flags != 1 || sscanf(handle.reserved, "%d %d %zu", &pid, &number, &size) != 3) return fail(cudaErrorInvalidValue);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, number);
    file = open(path, O_RDWR | O_CLOEXEC);
    return file < 0 ? fail(cudaErrorMapBufferObjectFailed) : map(to, file, size);
}
int fake_allocations(void) { return allocations; }
int fake_last(void) { return last; }
int fake_device(void) { return device; }

struct CUgraphNode_st {
    struct cudaMemcpy3DParms copy;
    cudaGraph_t child; /* a copy has none */
    cudaGraphNode_t before[64];
    size_t count;
    int done;
    cudaGraphNode_t next;
};
struct CUgraph_st { cudaGraphNode_t first, *end; };

cudaError_t cudaGraphCreate(cudaGraph_t *made, unsigned int flags) {
    if (flags) return fail(cudaErrorInvalidValue);
    *made = calloc(1, sizeof **made);
    (*made)->end = &(*made)->first;
    return cudaSuccess;
}
static cudaError_t add(cudaGraphNode_t *made, cudaGraph_t graph, const cudaGraphNode_t *before, size_t count) {
    if (count > 64) return fail(cudaErrorInvalidValue);
    *made = calloc(1, sizeof **made);
    if (count) memcpy((*made)->before, before, count * sizeof *before);
    (*made)->count = count;
    *graph->end = *made;
    graph->end = &(*made)->next;
    return cudaSuccess;
}
cudaError_t cudaGraphAddMemcpyNode(cudaGraphNode_t *made, cudaGraph_t graph, const cudaGraphNode_t *before,
                                   size_t count, const struct cudaMemcpy3DParms *copy) {
    size_t width = copy->extent.width;
    if (copy->kind != cudaMemcpyDefault || copy->srcArray || copy->dstArray || copy->srcPtr.pitch < width ||
        copy->dstPtr.pitch < width || copy->extent.depth != 1 || !width || !copy->extent.height)
        return fail(cudaErrorInvalidValue);
    cudaError_t error = add(made, graph, before, count);
    if (!error) (*made)->copy = *copy;
    return error;
}
cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t *made, cudaGraph_t graph, const cudaGraphNode_t *before,
                                       size_t count, cudaGraph_t child) {
    cudaError_t error = add(made, graph, before, count);
    if (!error) (*made)->child = child;
    return error;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    if (flags) return fail(cudaErrorInvalidValue);
    *made = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
static cudaError_t run(cudaGraph_t graph) {
    for (cudaGraphNode_t node = graph->first; node; node = node->next) node->done = 0;
    for (cudaGraphNode_t node = graph->first; node; node = node->next) {
        for (size_t i = 0; i < node->count; ++i)
            if (!node->before[i]->done) return fail(cudaErrorInvalidValue);
        if (node->child && run(node->child)) return last;
        for (size_t row = 0; !node->child && row < node->copy.extent.height; ++row)
            memcpy((char *)node->copy.dstPtr.ptr + row * node->copy.dstPtr.pitch,
                   (char *)node->copy.srcPtr.ptr + row * node->copy.srcPtr.pitch, node->copy.extent.width);
        node->done = 1;
    }
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    return stream == (cudaStream_t)13 ? fail(cudaErrorInvalidValue) : run((cudaGraph_t)exec);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { (void)exec; return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    for (cudaGraphNode_t node = graph->first, next; node; node = next) {
        next = node->next;
        free(node);
    }
    free(graph);
    return cudaSuccess;
}
