// Queries, keys and values to 8 bits on a device; the arithmetic is in quantize.h. Bound by memory: 2 bytes read and
// one written a value, each once. Not verified or measured on a GPU yet.
#include <cuda_fp8.h>

#include "fastvid.h"
#include "on_device.h"
#include "quantize.h"
#include "words.h"

namespace fastvid {
namespace quantize {
namespace {

template <bool BF16>
struct Device : Words<BF16> {
    __device__ __forceinline__ float lane_max(float value, int lanes) const {
        for (int step = lanes / 2; step > 0; step /= 2) {
            value = larger(__shfl_xor_sync(0xFFFFFFFFu, value, step), value);
        }
        return value;
    }
    __device__ __forceinline__ float lane_sum(float value, int lanes) const {
        for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
        return value;
    }
    template <bool Int8>
    __device__ __forceinline__ uint32_t pack8(float a, float b, float c, float d) const {
        if constexpr (Int8) {
            return byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
        } else {
            const uint32_t low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
            return low | static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3)) << 16;
        }
    }
    __device__ __forceinline__ static uint32_t byte(float x) { return __float2int_rn(x) & 0xFF; }
};

// Of a block: every thread gets it.
template <bool BF16>
__device__ float block_max(const Device<BF16>& hw, float value) {
    __shared__ float found[kThreads / 32];
    value = hw.lane_max(value, 32);
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = value;
    __syncthreads();
    value = found[0];
    for (int warp = 1; warp < kThreads / 32; ++warp) value = larger(found[warp], value);
    return value;
}

template <int D, bool BF16, bool Int8>
__global__ void __launch_bounds__(kThreads) quantize_queries_kernel(const Call s, const uint16_t* x, const float* mean,
                                                                    uint8_t* out, float* scale, float* shift) {
    const Device<BF16> hw;
    FASTVID_UNROLL
    for (int pass = 0; pass < passes<D>(); ++pass) {
        run_queries<Int8>(hw, s, blockIdx.x, threadIdx.x, pass, x, mean, out, scale, shift);
    }
}

template <int D, bool BF16, bool Int8>
__global__ void __launch_bounds__(kThreads)
    quantize_keys_kernel(const Call s, const uint16_t* x, const float* mean, uint8_t* out, float* scales) {
    const Device<BF16> hw;
    const Block block = block_of(s, blockIdx.x);
    Values values[passes<D>()];
    float highest = 0;
    FASTVID_UNROLL
    for (int pass = 0; pass < passes<D>(); ++pass) {
        values[pass] = load(hw, s, block, x, mean, token_of(s, threadIdx.x, pass), column_of(s, threadIdx.x));
        highest = larger(most(values[pass]), highest);
    }
    highest = block_max(hw, highest);
    FASTVID_UNROLL
    for (int pass = 0; pass < passes<D>(); ++pass) {
        store_keys<Int8>(hw, s, blockIdx.x, threadIdx.x, pass, values[pass], highest, out, scales);
    }
}

template <int D, bool BF16>
__global__ void __launch_bounds__(kThreads)
    quantize_values_kernel(const Call s, const uint16_t* x, uint8_t* out, float* scales) {
    __shared__ __align__(16) uint16_t kept[kKeys * padded(D)];
    const Device<BF16> hw;
    const Block block = block_of(s, blockIdx.x);
    float highest = 0;
    FASTVID_UNROLL
    for (int pass = 0; pass < passes<D>(); ++pass) {
        const Values values = load(hw, s, block, x, nullptr, token_of(s, threadIdx.x, pass), column_of(s, threadIdx.x));
        highest = larger(most(values), highest);
        keep_values(s, threadIdx.x, pass, hw, values, kept);
    }
    highest = block_max(hw, highest);  // where the block meets: all is kept
    store_values(hw, s, blockIdx.x, threadIdx.x, highest, kept, out, scales);
}

template <int D, bool BF16, bool Int8>
void launch(Part part, const Call& s, const uint16_t* x, const float* mean, uint8_t* out, float* scales, float* shift,
            cudaStream_t stream) {
    const auto grid = static_cast<unsigned>(s.batch * s.heads * blocks(s));
    if (part == Part::kQueries) {
        quantize_queries_kernel<D, BF16, Int8><<<grid, kThreads, 0, stream>>>(s, x, mean, out, scales, shift);
    } else if (part == Part::kKeys) {
        quantize_keys_kernel<D, BF16, Int8><<<grid, kThreads, 0, stream>>>(s, x, mean, out, scales);
    } else {
        quantize_values_kernel<D, BF16><<<grid, kThreads, 0, stream>>>(s, x, out, scales);
    }
}

template <int D, bool BF16>
auto pick(bool int8) {
    return int8 ? launch<D, BF16, true> : launch<D, BF16, false>;
}

}  // namespace
}  // namespace quantize

int quantize_part(quantize::Part part, const quantize::Call& s, bool int8, const void* x, const float* mean, void* out,
                  float* scales, float* shift, DType dtype, int device, void* stream) {
    if (dtype == DType::kFloat32) return cudaErrorInvalidValue;
    const bool bf16 = dtype == DType::kBFloat16;
    const auto launch = s.head_dim == 128 ? (bf16 ? quantize::pick<128, true>(int8) : quantize::pick<128, false>(int8))
                                          : (bf16 ? quantize::pick<64, true>(int8) : quantize::pick<64, false>(int8));
    return on_device(device, [&] {
        launch(part, s, static_cast<const uint16_t*>(x), mean, static_cast<uint8_t*>(out), scales, shift,
               static_cast<cudaStream_t>(stream));
        return cudaGetLastError();
    });
}

}  // namespace fastvid
