// What attention of 8-bit values asks of sm_90a, as attention_kernel.h names it.
#pragma once

#include <cuda_fp8.h>

#include "attention_eight.h"
#include "attention_sm90.h"

// D[64, N] (+)= A B, all rows along K. The flags of e4m3 are the signs of A and B; int8 has none.
#define FASTVID_SCORES8(KIND, FLAGS, ...)                                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k32." KIND \
                 " {" FASTVID_NAMES64 "}, %64, %65, p" FLAGS ";\n}\n"                                      \
                 : __VA_ARGS__                                                                             \
                 : "l"(a), "l"(b), "n"(Add ? 1 : 0))

#define FASTVID_VALUES8(N, NAMES, A, B, P, ...)                                                                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N            \
                 "k32.f32.e4m3.e4m3 {" NAMES "}, {" A "}, " B ", p, 1, 1;\n}\n"                                \
                 : __VA_ARGS__                                                                                 \
                 : "r"(a[4 * step]), "r"(a[4 * step + 1]), "r"(a[4 * step + 2]), "r"(a[4 * step + 3]), "l"(b), \
                   "n"(Add ? 1 : 0))

namespace fastvid::attention {

template <bool Add>
__device__ __forceinline__ void multiply_keys8(float (&d)[64], uint64_t a, uint64_t b) {
    FASTVID_SCORES8("f32.e4m3.e4m3", ", 1, 1", FASTVID_ACC32(d, 0), FASTVID_ACC32(d, 32));
}
template <bool Add>
__device__ __forceinline__ void multiply_keys8(int32_t (&d)[64], uint64_t a, uint64_t b) {
    FASTVID_SCORES8("s32.s8.s8", "", FASTVID_INT32(d, 0), FASTVID_INT32(d, 32));
}

template <bool Add>
__device__ __forceinline__ void multiply_values8(float (&d)[64], const uint32_t (&a)[16], int step, uint64_t b) {
    FASTVID_VALUES8(128, FASTVID_NAMES64, "%64, %65, %66, %67", "%68", "%69", FASTVID_ACC32(d, 0),
                    FASTVID_ACC32(d, 32));
}
template <bool Add>
__device__ __forceinline__ void multiply_values8(float (&d)[32], const uint32_t (&a)[16], int step, uint64_t b) {
    FASTVID_VALUES8(64, FASTVID_NAMES32, "%32, %33, %34, %35", "%36", "%37", FASTVID_ACC32(d, 0));
}

template <int D, bool Int8, bool BF16>
class Sm90Eight : public Warpgroups<Eight<D>>, public Words<BF16> {
    using Base = Warpgroups<Eight<D>>;

  public:
    using Base::Base;
    using Raw = typename Base::template Registers<std::conditional_t<Int8, int32_t, float>, kKeys / 2>;
    using Scores = typename Base::template Registers<float, kKeys / 2>;
    using Output = typename Base::template Registers<float, D / 2>;
    using Weights = typename Base::template Registers<uint32_t, kKeys / 8>;

    template <bool Add>
    __device__ __forceinline__ void scores(Raw& to, uint64_t queries, uint64_t keys) const {
        multiply_keys8<Add>(to.value, queries, keys);
    }
    template <bool Add>
    __device__ __forceinline__ void values(Output& to, Weights& weights, int step, uint64_t values) const {
        multiply_values8<Add>(to.value, weights.value, step, values);
    }
    __device__ __forceinline__ float widen(float x) const { return x; }
    __device__ __forceinline__ float widen(int32_t x) const { return __int2float_rn(x); }

    // Four e4m3, the first in the lowest byte.
    __device__ __forceinline__ uint32_t pack8(float a, float b, float c, float d) const {
        const uint32_t low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
        return low | static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3)) << 16;
    }
};

}  // namespace fastvid::attention
