// As much of CUDA's runtime as the launchers' headers use, on a pretended machine: a thread has a context once it has
// set its device, and the driver's calls fail without one.
#pragma once

#include <cstdint>

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorNotSupported = 801;
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr int cudaEnableDefault = 0;
#define CUDART_VERSION 13000

namespace stub {
inline thread_local int device = 0;    // the one that is current
inline thread_local int context = -1;  // whose context is bound; none
inline int devices = 2, lookups = 0;   // how many there are; how often the driver was asked for an entry point
inline bool found = true;              // whether it has it
void* entry(const char* name);
}  // namespace stub

inline cudaError_t cudaGetDevice(int* device) {
    *device = stub::device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= stub::devices) return 101;
    stub::device = stub::context = device;
    return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** to, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
    ++stub::lookups;
    *to = stub::found ? stub::entry(name) : nullptr;
    *result = *to ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
