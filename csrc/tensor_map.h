// Tensor maps for TMA, made by the driver, which is not linked to but asked for.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <atomic>

#include "sm90_layout.h"

namespace fastvid::sm90 {

inline PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

// Kept once it is found; a failure is not: the next call asks again.
inline PFN_cuTensorMapEncodeTiled_v12000 encoder() {
    static std::atomic<PFN_cuTensorMapEncodeTiled_v12000> kept{nullptr};
    PFN_cuTensorMapEncodeTiled_v12000 found = kept.load();
    if (found == nullptr && (found = find_encoder()) != nullptr) kept.store(found);
    return found;
}

// Rows of 128 or 64 bytes are swizzled; beyond the extents are zeros. The calling thread needs a context: on_device.h.
inline cudaError_t encode(CUtensorMap* to, const Map& map, CUtensorMapDataType type) {
    const auto encode_tiled = encoder();
    if (encode_tiled == nullptr) return cudaErrorNotSupported;
    cuuint64_t extent[5], stride[4];
    cuuint32_t box[5], every[5];
    for (int i = 0; i < map.rank; ++i) {
        extent[i] = map.extent[i];
        box[i] = map.box[i];
        every[i] = map.every[i];
        if (i) stride[i - 1] = map.stride[i - 1];
    }
    const auto swizzle = map.box[0] * map.bytes == kRow ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    const CUresult result = encode_tiled(to, type, map.rank, const_cast<void*>(map.base), extent, stride, box, every,
                                         CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return static_cast<cudaError_t>(result);  // both count errors alike
}

inline cudaError_t encode(CUtensorMap* to, const Map& map, bool bf16) {
    return encode(to, map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
}

}  // namespace fastvid::sm90
