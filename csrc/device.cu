// What the CUDA runtime says of this machine; nothing here raises where there is no driver.
#include <cuda_runtime.h>

#include "fastvid.h"

namespace fastvid {

const char* error_string(int error) {
    cudaGetLastError();  // forgotten, or the next launch would be told of it
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    cudaGetLastError();
    return 0;
}

int driver_version() {
    int version = 0;
    if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
    cudaGetLastError();
    return 0;
}

int compute_capability(int device) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        cudaGetLastError();
        return 0;
    }
    return major * 10 + minor;
}

}  // namespace fastvid
