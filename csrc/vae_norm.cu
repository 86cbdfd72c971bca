// RMS norm and SiLU of a VAE's features on a device; the arithmetic is in vae_norm.h. Bound by memory: 2 bytes read and
// 2 written a value. On an H200 a multiprocessor has 4 instructions a clock and gets 4.6 values in it, so a value may
// cost 27 instructions of a lane before they are the limit.
#include "fastvid.h"
#include "on_device.h"
#include "vae_norm.h"
#include "words.h"

namespace fastvid {
namespace {

constexpr int kThreads = 256;

template <bool BF16>
struct Math : Words<BF16> {
    __device__ __forceinline__ float exp2(float x) const {
        float made;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
        return made;
    }
    __device__ __forceinline__ float reciprocal(float x) const {
        float made;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
        return made;
    }
    __device__ __forceinline__ float rsqrt(float x) const {
        float made;
        asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
        return made;
    }
};

// Kept whole by every lane: the groups of a warp lie side by side.
struct GroupSum {
    int lanes;
    __device__ __forceinline__ float operator()(float value) const {
        for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
        return value;
    }
};

// A thread's pixels lie as far apart as a block has groups, so that groups side by side read pixels side by side.
template <typename Index>
__device__ __forceinline__ Index first_pixel(const norm::Plan& s) {
    return static_cast<Index>(blockIdx.x) * (norm::kPixels * (kThreads >> s.log_lanes)) + (threadIdx.x >> s.log_lanes);
}

template <bool BF16, bool Silu, int Many>
__global__ void __launch_bounds__(kThreads)
    vae_norm_kernel(const norm::Plan s, const uint16_t* x, const uint16_t* gamma, uint16_t* out) {
    const Math<BF16> math;
    const int lanes = 1 << s.log_lanes, lane = threadIdx.x & (lanes - 1);
    const uint32_t pixels = static_cast<uint32_t>(s.pixels), turn = kThreads >> s.log_lanes;
    const auto factors = norm::load<Many>(s, gamma, lane, 0, true);
    uint32_t pixel = first_pixel<uint32_t>(s);
    norm::Offsets at = norm::offsets_of(s, pixel);
    auto part = norm::load<Many>(s, x + at.x, lane, 0, pixel < pixels);
#pragma unroll 1
    for (int i = 0; i < norm::kPixels; ++i) {
        // The next pixel is on its way while this one is made.
        const norm::Offsets next = norm::offsets_of(s, pixel + turn);
        const bool more = i + 1 < norm::kPixels && pixel + turn < pixels;
        const auto after = norm::load<Many>(s, x + next.x, lane, 0, more);
        norm::run<Silu>(math, s, part, factors, out + at.out, lane, pixel < pixels, GroupSum{lanes});
        part = after;
        at = next;
        pixel += turn;
    }
}

template <bool BF16, bool Silu>
__global__ void __launch_bounds__(kThreads)
    vae_norm_wide_kernel(const norm::Plan s, const uint16_t* x, const uint16_t* gamma, uint16_t* out) {
    const int lanes = 1 << s.log_lanes, lane = threadIdx.x & (lanes - 1);
    int64_t pixel = first_pixel<int64_t>(s);
    for (int i = 0; i < norm::kPixels; ++i) {
        const norm::Offsets at = norm::offsets_of(s, pixel);
        norm::run_wide<Silu, 4>(Math<BF16>(), s, x + at.x, gamma, out + at.out, lane, pixel < s.pixels,
                                GroupSum{lanes});
        pixel += kThreads >> s.log_lanes;
    }
}

using Kernel = void (*)(norm::Plan, const uint16_t*, const uint16_t*, uint16_t*);

template <bool BF16, bool Silu>
Kernel kernel_of(const norm::Plan& s) {
    if (s.wide) return vae_norm_wide_kernel<BF16, Silu>;
    return s.many == 3 ? vae_norm_kernel<BF16, Silu, 3> : vae_norm_kernel<BF16, Silu, 4>;
}

template <bool BF16>
Kernel kernel_of(const norm::Plan& s, bool silu) {
    return silu ? kernel_of<BF16, true>(s) : kernel_of<BF16, false>(s);
}

}  // namespace

int vae_norm(const norm::Norm& shape, const void* x, const void* gamma, void* out, DType dtype, int device,
             void* stream) {
    const norm::Plan s = norm::plan_of(shape);
    const int64_t of_block = norm::kPixels * (kThreads >> s.log_lanes), grid = (s.pixels + of_block - 1) / of_block;
    if (grid > conv::kMostBlocks || dtype == DType::kFloat32) return cudaErrorInvalidValue;
    const Kernel kernel = dtype == DType::kBFloat16 ? kernel_of<true>(s, shape.silu) : kernel_of<false>(s, shape.silu);
    return on_device(device, [&] {
        kernel<<<static_cast<unsigned>(grid), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            s, static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(gamma), static_cast<uint16_t*>(out));
        return cudaGetLastError();
    });
}

}  // namespace fastvid
