// The arithmetic of frames -> 8-bit RGB for one run of pixels, the same for the device and the host.
//
//   byte = rint((clamp(x, -1, 1) * 0.5 + 0.5) * 255), ties to even, NaN -> 0, in IEEE fp32
//
// A run is VEC pixels of one row: one vector load a plane, and VEC * 3 bytes written as 32-bit words.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "fastvid.h"

#define FASTVID_HD __host__ __device__ __forceinline__

namespace fastvid {

FASTVID_HD float widen(float x) {
    return x;
}
FASTVID_HD float widen(__half x) {
    return __half2float(x);
}
FASTVID_HD float widen(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

// A comparison with NaN is false, so NaN, signalling or not, is taken for -1. No addition follows the product: nothing
// that a fused multiply-add could round differently (x * 0.5 is exact wherever adding 0.5 does not hide it).
FASTVID_HD uint32_t rgb_byte(float x) {
    x = x > -1.0f ? x : -1.0f;
    x = x < 1.0f ? x : 1.0f;
    return static_cast<uint32_t>(rintf((x * 0.5f + 0.5f) * 255.0f));
}

// Rows, then frames, that follow one another in memory are one long row: fewer, longer runs.
inline Frames collapse_rows(Frames f) {
    if (f.stride_w == 1 && (f.height == 1 || f.stride_h == f.width)) {
        f.width *= f.height;
        f.height = 1;
        if (f.frames == 1 || f.stride_t == f.width) {
            f.width *= f.frames;
            f.frames = 1;
        }
    }
    return f;
}

// Whether every run of `vec` pixels starts on a vector in src and on a 32-bit word in dst.
inline bool vectors_fit(const void* src, const uint8_t* dst, const Frames& f, int vec) {
    const auto whole = [vec](int64_t extent, int64_t stride) { return extent == 1 || stride % vec == 0; };
    const bool one_row = f.frames * f.height == 1;
    return f.stride_w == 1 && reinterpret_cast<uintptr_t>(src) % 16 == 0 && reinterpret_cast<uintptr_t>(dst) % 4 == 0 &&
           (one_row || f.width % 4 == 0) && f.stride_c % vec == 0 && whole(f.frames, f.stride_t) &&
           whole(f.height, f.stride_h);
}

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
    T lane[VEC];
};

// Pixels [col, col + VEC) of a row, all of them inside it; src and dst point at the first one.
template <typename T, int VEC>
FASTVID_HD void rgb_vector(const T* src, uint8_t* dst, int64_t stride_c) {
    uint32_t words[VEC * 3 / 4] = {};
#pragma unroll
    for (int c = 0; c < 3; ++c) {
        const Pack<T, VEC> plane = *reinterpret_cast<const Pack<T, VEC>*>(src + c * stride_c);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const int byte = i * 3 + c;
            words[byte / 4] |= rgb_byte(widen(plane.lane[i])) << (byte % 4 * 8);
        }
    }
#pragma unroll
    for (int i = 0; i < VEC * 3 / 4; ++i) {
        reinterpret_cast<uint32_t*>(dst)[i] = words[i];
    }
}

// Pixels [col, min(col + VEC, width)) of row `row` of T * H; VEC = 1 is the path for any strides and alignment.
template <typename T, int VEC>
FASTVID_HD void rgb_run(const T* src, uint8_t* dst, const Frames& f, int64_t row, int64_t col) {
    src += row / f.height * f.stride_t + row % f.height * f.stride_h + col * f.stride_w;
    dst += (row * f.width + col) * 3;
    if constexpr (VEC > 1) {
        if (col + VEC <= f.width) {
            rgb_vector<T, VEC>(src, dst, f.stride_c);
            return;
        }
    }
    const int64_t pixels = f.width - col < VEC ? f.width - col : VEC;
    for (int64_t i = 0; i < pixels; ++i) {
        for (int c = 0; c < 3; ++c) {
            dst[i * 3 + c] = static_cast<uint8_t>(rgb_byte(widen(src[c * f.stride_c + i * f.stride_w])));
        }
    }
}

}  // namespace fastvid
