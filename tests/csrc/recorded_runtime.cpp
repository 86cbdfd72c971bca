// A CUDA runtime of one device that is not there, an H100: it hands over what launchers ask for, parameters and all, to
// a function that tests set, and encodes tensor maps as tests/ptx/tma.py reads them. Linked in the place of libcudart.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

namespace {

struct Launch {
    const char* kernel;
    unsigned grid[3], block[3], cluster;
    uint64_t shared;
    void** params;
};
using Listener = void (*)(const Launch*);

constexpr int kPlain = 48 * 1024, kMost = 227 * 1024;  // bytes of shared memory, without and with asking for it

Listener listener = nullptr;
int processors = 132;
bool bound = false;  // whether a thread has a context
cudaError_t last = cudaSuccess;
std::map<const void*, std::string>& names() {
    static std::map<const void*, std::string> kept;
    return kept;
}
std::map<const void*, int>& limits() {
    static std::map<const void*, int> kept;
    return kept;
}
struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} pushed;

cudaError_t remember(cudaError_t error) {
    if (error != cudaSuccess) last = error;
    return error;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, unsigned cluster, void** params) {
    const auto name = names().find(kernel);
    const auto limit = limits().find(kernel);
    if (!bound || name == names().end()) return remember(cudaErrorInvalidDeviceFunction);
    if (shared > static_cast<size_t>(limit == limits().end() ? kPlain : limit->second) || grid.x == 0 || grid.y == 0 ||
        grid.y > 65535 || block.x * block.y * block.z > 1024) {
        return remember(cudaErrorInvalidConfiguration);
    }
    const Launch made = {
        name->second.c_str(), {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, cluster, shared, params};
    if (listener) listener(&made);
    return cudaSuccess;
}

int size_of(CUtensorMapDataType type) {
    switch (type) {
        case CU_TENSOR_MAP_DATA_TYPE_UINT8:
            return 1;
        case CU_TENSOR_MAP_DATA_TYPE_UINT16:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
        case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
            return 2;
        default:
            return 4;
    }
}

// The layout of tma.py.
struct __attribute__((packed)) Encoded {
    uint32_t magic = 0x50414D54;
    uint8_t rank, size, swizzle, unused = 0;
    uint64_t base, extent[5] = {}, stride[4] = {};
    uint16_t box[5] = {};
    uint8_t every[5] = {};
};
static_assert(sizeof(Encoded) <= sizeof(CUtensorMap), "a map has 128 bytes");

CUresult encode(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* extent,
                const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* every,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
    constexpr int kSwizzled[] = {0, 32, 64, 128};
    if (!bound) return CUDA_ERROR_INVALID_CONTEXT;
    if (rank < 1 || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle > CU_TENSOR_MAP_SWIZZLE_128B ||
        fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || reinterpret_cast<uintptr_t>(to) % 64) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    Encoded made;
    made.rank = static_cast<uint8_t>(rank);
    made.size = static_cast<uint8_t>(size_of(type));
    made.swizzle = static_cast<uint8_t>(kSwizzled[swizzle]);
    made.base = reinterpret_cast<uint64_t>(base);
    for (cuuint32_t i = 0; i < rank; ++i) {
        made.extent[i] = extent[i];
        made.box[i] = static_cast<uint16_t>(box[i]);
        made.every[i] = static_cast<uint8_t>(every[i]);
        if (i) made.stride[i - 1] = stride[i - 1];
        if (box[i] > 256 || every[i] > 8) return CUDA_ERROR_INVALID_VALUE;
    }
    std::memset(to, 0, sizeof *to);
    std::memcpy(to, &made, sizeof made);
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void recorded_listen(Listener to, int count) {
    listener = to;
    processors = count;
}

// What nvcc's own code calls.

void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) {
    return 1;
}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
    names()[function] = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *static_cast<void**>(stream) = pushed.stream;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** params, size_t shared, cudaStream_t) {
    return launch(kernel, grid, block, shared, 0, params);
}

// What launchers call.

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** params, size_t shared, cudaStream_t) {
    return launch(kernel, grid, block, shared, 0, params);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** params) {
    unsigned cluster = 0;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const cudaLaunchAttribute& one = config->attrs[i];
        if (one.id == cudaLaunchAttributeClusterDimension) {
            cluster = one.val.clusterDim.x * one.val.clusterDim.y * one.val.clusterDim.z;
        }
    }
    return launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster, params);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
    if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > kMost) return remember(cudaErrorInvalidValue);
    limits()[kernel] = value;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device != 0) return remember(cudaErrorInvalidDevice);
    bound = true;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    const std::map<int, int> known = {{cudaDevAttrComputeCapabilityMajor, 9},
                                      {cudaDevAttrComputeCapabilityMinor, 0},
                                      {cudaDevAttrMultiProcessorCount, processors},
                                      {cudaDevAttrMaxSharedMemoryPerBlockOptin, kMost}};
    const auto found = known.find(which);
    if (found == known.end()) return remember(cudaErrorInvalidValue);
    *value = found->second;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    const cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
const char* cudaGetErrorString(cudaError_t) {
    return "an error of the recorded runtime";
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *found = known ? reinterpret_cast<void*>(&encode) : nullptr;
    if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

}  // extern "C"
