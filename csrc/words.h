// Two 16-bit values of a 32-bit word, on a device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastvid {

template <bool BF16>
struct Words {
    __device__ __forceinline__ void unpack(uint32_t word, float& x, float& y) const {
        if constexpr (BF16) {
            x = __uint_as_float(word << 16);
            y = __uint_as_float(word & 0xFFFF0000u);
        } else {
            x = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
            y = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
        }
    }
    __device__ __forceinline__ uint32_t pack(float x, float y) const {
        if constexpr (BF16) {
            return __bfloat16_as_ushort(__float2bfloat16_rn(x)) |
                   static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(y))) << 16;
        } else {
            return __half_as_ushort(__float2half_rn(x)) | static_cast<uint32_t>(__half_as_ushort(__float2half_rn(y)))
                                                              << 16;
        }
    }
};

}  // namespace fastvid
