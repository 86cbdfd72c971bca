// Launches a kernel of attention for sm_90a: as many blocks as the device has multiprocessors, or fewer works.
#pragma once

#include "attention.h"
#include "on_device.h"
#include "tensor_map.h"

namespace fastvid::attention {

// kernel: of maps of q, k and v, `Attention`, out and lse; tile: bytes of its tiles.
template <typename Kernel>
cudaError_t launch_blocks(Kernel kernel, int tile, const Map (&maps)[3], CUtensorMapDataType type, const Attention& s,
                          void* out, float* lse, int device, cudaStream_t stream) {
    int processors = 0;
    CUtensorMap encoded[3];
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    for (int i = 0; i < 3 && error == cudaSuccess; ++i) error = sm90::encode(&encoded[i], maps[i], type);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes(tile));
    }
    if (error != cudaSuccess) return error;
    const int64_t grid = works(s) < processors ? works(s) : processors;
    kernel<<<static_cast<unsigned>(grid), kThreads, smem_bytes(tile), stream>>>(encoded[0], encoded[1], encoded[2], s,
                                                                                static_cast<uint16_t*>(out), lse);
    return cudaGetLastError();
}

}  // namespace fastvid::attention
