// What every launcher does around its launch: it makes a device the current one, and the one before it again.
#pragma once

#include <cuda_runtime.h>

namespace fastvid {

// cudaSetDevice also binds the device's primary context to the calling thread: a thread whose first call of CUDA this
// is has none, cudaGetDevice does not bind one, and the driver's own calls (tensor_map.h) refuse to work without.
template <typename Launch>
cudaError_t on_device(int device, Launch launch) {
    int before = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    error = launch();
    if (before != device) cudaSetDevice(before);
    return error;
}

}  // namespace fastvid
