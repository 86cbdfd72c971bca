// What every launcher does around its launch: it makes a device the current one, and the one before it again.
#pragma once

#include <cuda_runtime.h>

namespace fastvid {

template <typename Launch>
cudaError_t on_device(int device, Launch launch) {
    int before = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before == device) return launch();
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    error = launch();
    cudaSetDevice(before);
    return error;
}

}  // namespace fastvid
