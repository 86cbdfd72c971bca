// RMS norm and SiLU of a VAE's features on a device; the arithmetic is in vae_norm.h. Bound by memory: 2 bytes read and
// 2 written a value (they are read a second time, from the cache).
#include "fastvid.h"
#include "on_device.h"
#include "vae_norm.h"
#include "words.h"

namespace fastvid {
namespace {

constexpr int kThreads = 256;

// Kept whole by every lane: the groups of a warp lie side by side.
struct GroupSum {
    int lanes;
    __device__ float operator()(float value) const {
        for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
        return value;
    }
};

template <bool BF16>
__global__ void __launch_bounds__(kThreads)
    vae_norm_kernel(const norm::Norm s, const uint16_t* x, const uint16_t* gamma, uint16_t* out, int lanes) {
    const int64_t pixel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
    norm::run(Words<BF16>(), s, x, gamma, out, pixel, threadIdx.x % lanes, lanes, GroupSum{lanes});
}

}  // namespace

int vae_norm(const norm::Norm& s, const void* x, const void* gamma, void* out, DType dtype, int device, void* stream) {
    const int lanes = norm::lanes_of(s.channels);
    const int64_t grid = (norm::pixels(s) * lanes + kThreads - 1) / kThreads;
    if (grid > conv::kMostBlocks || dtype == DType::kFloat32) return cudaErrorInvalidValue;
    const auto kernel = dtype == DType::kBFloat16 ? vae_norm_kernel<true> : vae_norm_kernel<false>;
    return on_device(device, [&] {
        kernel<<<static_cast<unsigned>(grid), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            s, static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(gamma), static_cast<uint16_t*>(out),
            lanes);
        return cudaGetLastError();
    });
}

}  // namespace fastvid
