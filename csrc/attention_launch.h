// Launches a kernel of attention for sm_90a: as many blocks as the device has multiprocessors, or fewer works.
#pragma once

#include "attention.h"
#include "on_device.h"
#include "tensor_map.h"

namespace fastvid::attention {

// kernel: of maps of q, k and v, `Attention`, out and lse; room: its shared memory. Blocks of a cluster: works are a
// multiple of them.
template <int Blocks = 1, typename Kernel>
cudaError_t launch_blocks(Kernel kernel, const Room& room, const Map (&maps)[3], CUtensorMapDataType type,
                          const Attention& s, void* out, float* lse, int device, cudaStream_t stream) {
    int processors = 0;
    CUtensorMap encoded[3];
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    for (int i = 0; i < 3 && error == cudaSuccess; ++i) error = sm90::encode(&encoded[i], maps[i], type);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room.bytes());
    }
    if (error != cudaSuccess) return error;
    const int64_t most = processors / Blocks * Blocks;
    const int64_t grid = works(s) < most ? works(s) : most;
    kernel<<<static_cast<unsigned>(grid), kThreads, room.bytes(), stream>>>(encoded[0], encoded[1], encoded[2], s,
                                                                            static_cast<uint16_t*>(out), lse);
    return cudaGetLastError();
}

}  // namespace fastvid::attention
