// Quantized weights [N, K] -> numbers, the same for the device and the host. fastvid/ops/formats_rows.py,
// formats_gguf.py and formats_blocks.py say what the bytes mean; here every product and sum is rounded in their order,
// so results are equal bit for bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "dequantize_call.h"

#define FASTVID_HD __host__ __device__ __forceinline__

namespace fastvid {
namespace weights {

constexpr int kRun = 8;  // neighbouring weights of a row that a thread makes

// Products and sums that are rounded each: a fused multiply-add would give other bits.
FASTVID_HD float times(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
FASTVID_HD float plus(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}
FASTVID_HD float minus(float a, float b) {
    return plus(a, -b);
}

FASTVID_HD float half_at(const uint8_t* bytes) {
    __half_raw raw;
    raw.x = static_cast<uint16_t>(bytes[0] | bytes[1] << 8);
    return __half2float(__half(raw));
}
FASTVID_HD float e4m3(uint8_t code) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}
FASTVID_HD float e5m2(uint8_t code) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E5M2)));
}

// The value of a code of IQ4.
FASTVID_HD int iq4(int code) {
    constexpr uint64_t kLow = 0xf6eaddcfbfad9881ull, kHigh = 0x7159453526190d01ull;  // int8, the first value lowest
    const uint64_t half = code < 8 ? kLow : kHigh;
    return static_cast<int8_t>(half >> (code % 8 * 8) & 0xFF);
}

// A 4-bit float with two bits of exponent; bit 3 is the sign.
FASTVID_HD float e2m1(int code) {
    constexpr uint64_t kTwice = 0x0C08060403020100ull;  // twice the magnitudes 0 .5 1 1.5 2 3 4 6
    const float twice = static_cast<float>(kTwice >> (code % 8 * 8) & 0xFF);
    return (code & 8) ? -0.5f * twice : 0.5f * twice;
}

// Where the scale of block c of row r stands among tiles of 128 rows and 4 blocks; blocks: of a row.
FASTVID_HD int64_t tiled(int64_t r, int64_t c, int64_t blocks) {
    const int64_t tile = r / 128 * ((blocks + 3) / 4) + c / 4;
    return tile * 512 + r % 32 * 16 + r % 128 / 32 * 4 + c % 4;
}

// The block of a format: weights and bytes; 1 and 0 for those without blocks.
template <Format F>
FASTVID_HD constexpr int block_weights() {
    return F >= Format::kQ2_K && F <= Format::kIQ4_XS ? 256 : F >= Format::kQ8_0 && F <= Format::kIQ4_NL ? 32 : 1;
}
template <Format F>
FASTVID_HD constexpr int block_bytes() {
    switch (F) {
        case Format::kQ8_0:
            return 34;
        case Format::kQ4_0:
        case Format::kIQ4_NL:
            return 18;
        case Format::kQ4_1:
            return 20;
        case Format::kQ5_0:
            return 22;
        case Format::kQ5_1:
            return 24;
        case Format::kQ2_K:
            return 84;
        case Format::kQ3_K:
            return 110;
        case Format::kQ4_K:
            return 144;
        case Format::kQ5_K:
            return 176;
        case Format::kQ6_K:
            return 210;
        case Format::kIQ4_XS:
            return 136;
        default:
            return 0;
    }
}

// Weight i (0 to 31) of a block of 32.
FASTVID_HD int nibble32(const uint8_t* codes, int i) {
    return i < 16 ? codes[i] & 15 : codes[i - 16] >> 4;
}
FASTVID_HD int fifth(const uint8_t* bits, int i) {
    return (bits[i / 8] >> i % 8 & 1) << 4;
}

template <Format F>
FASTVID_HD float value32(const uint8_t* b, int i) {
    const float d = half_at(b);
    if constexpr (F == Format::kQ8_0) {
        return times(static_cast<float>(static_cast<int8_t>(b[2 + i])), d);
    } else if constexpr (F == Format::kQ4_0) {
        return times(static_cast<float>(nibble32(b + 2, i) - 8), d);
    } else if constexpr (F == Format::kQ4_1) {
        return plus(times(static_cast<float>(nibble32(b + 4, i)), d), half_at(b + 2));
    } else if constexpr (F == Format::kQ5_0) {
        return times(static_cast<float>((nibble32(b + 6, i) | fifth(b + 2, i)) - 16), d);
    } else if constexpr (F == Format::kQ5_1) {
        return plus(times(static_cast<float>(nibble32(b + 8, i) | fifth(b + 4, i)), d), half_at(b + 2));
    } else {
        return times(static_cast<float>(iq4(nibble32(b + 2, i))), d);
    }
}

// The six-bit scale (high = 0) or minimum (1) of sub-block j of Q4_K and Q5_K.
FASTVID_HD int six_bits(const uint8_t* scales, int j, int high) {
    if (j < 4) return scales[j + 4 * high] & 63;
    const int low = high ? scales[j + 4] >> 4 : scales[j + 4] & 15;
    return low | scales[j - 4 + 4 * high] >> 6 << 4;
}

// Weight i (0 to 255) of a block of 256.
template <Format F>
FASTVID_HD float value256(const uint8_t* b, int i) {
    if constexpr (F == Format::kQ2_K) {
        const int code = b[16 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3, scales = b[i / 16];
        const float scale = times(static_cast<float>(scales & 15), half_at(b + 80));
        const float less = times(static_cast<float>(scales >> 4), half_at(b + 82));
        return minus(times(static_cast<float>(code), scale), less);
    } else if constexpr (F == Format::kQ3_K) {
        const int low = b[32 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3, high = b[i % 32] >> i / 32 & 1;
        const int s = i / 16, four = b[96 + s % 8] >> s / 8 * 4 & 15, two = b[104 + s % 4] >> s / 4 * 2 & 3;
        const float scale = times(static_cast<float>((four | two << 4) - 32), half_at(b + 108));
        return times(static_cast<float>((low | high << 2) - 4), scale);
    } else if constexpr (F == Format::kQ4_K || F == Format::kQ5_K) {
        constexpr int kCodes = F == Format::kQ4_K ? 16 : 48;
        const int byte = b[kCodes + i / 64 * 32 + i % 32];
        int code = i % 64 < 32 ? byte & 15 : byte >> 4;
        if constexpr (F == Format::kQ5_K) code |= (b[16 + i % 32] >> i / 32 & 1) << 4;
        const float scale = times(static_cast<float>(six_bits(b + 4, i / 32, 0)), half_at(b));
        const float less = times(static_cast<float>(six_bits(b + 4, i / 32, 1)), half_at(b + 2));
        return minus(times(static_cast<float>(code), scale), less);
    } else if constexpr (F == Format::kQ6_K) {
        const int half = i / 128, j = i % 128, byte = b[half * 64 + j % 64];
        const int low = j < 64 ? byte & 15 : byte >> 4, high = b[128 + half * 32 + j % 32] >> j / 32 * 2 & 3;
        const float scale = times(static_cast<float>(static_cast<int8_t>(b[192 + i / 16])), half_at(b + 208));
        return times(static_cast<float>((low | high << 4) - 32), scale);
    } else {  // IQ4_XS
        const int j = i / 32, four = b[4 + j / 2] >> j % 2 * 4 & 15, two = (b[2] | b[3] << 8) >> 2 * j & 3;
        const float scale = times(static_cast<float>((four | two << 4) - 32), half_at(b));
        return times(static_cast<float>(iq4(nibble32(b + 8 + 16 * j, i % 32))), scale);
    }
}

// Weight k of row r.
template <Format F>
FASTVID_HD float value(const Matrix& m, int64_t r, int64_t k) {
    const uint8_t* row = m.codes + r * m.row_bytes;
    if constexpr (block_weights<F>() == 32) {
        return value32<F>(row + k / 32 * block_bytes<F>(), static_cast<int>(k % 32));
    } else if constexpr (block_weights<F>() == 256) {
        return value256<F>(row + k / 256 * block_bytes<F>(), static_cast<int>(k % 256));
    } else if constexpr (F == Format::kMxFp8) {
        const int exponent = static_cast<const uint8_t*>(m.scale)[tiled(r, k / 32, m.scales)];
        return exponent == 0 ? times(e4m3(row[k]), 0.0f) : times(e4m3(row[k]), ldexpf(1.0f, exponent - 127));
    } else if constexpr (F == Format::kNvFp4 || F == Format::kNvFp4Low) {
        const int byte = row[k / 2], code = (F == Format::kNvFp4) == (k % 2 == 0) ? byte >> 4 : byte & 15;
        const float scale = e4m3(static_cast<const uint8_t*>(m.scale)[tiled(r, k / 16, m.scales)]);
        return times(e2m1(code), times(m.values[0], scale));
    } else if constexpr (F == Format::kNf4 || F == Format::kNf4Double) {
        const int64_t at = r * m.columns + k, block = at >> m.scales;
        const int byte = m.codes[at / 2], code = at % 2 == 0 ? byte >> 4 : byte & 15;
        float scale;
        if constexpr (F == Format::kNf4) {
            scale = static_cast<const float*>(m.scale)[block];
        } else {
            const float nested = m.nested_map[static_cast<const uint8_t*>(m.scale)[block]];
            scale = plus(times(nested, m.nested_scale[block / 256]), m.nested_offset[0]);
        }
        return times(m.values[code], scale);
    } else {
        const float scale = static_cast<const float*>(m.scale)[m.scales == 1 ? 0 : r];
        const float code = F == Format::kFp8E4M3   ? e4m3(row[k])
                           : F == Format::kFp8E5M2 ? e5m2(row[k])
                                                   : static_cast<float>(static_cast<int8_t>(row[k]));
        return times(code, scale);
    }
}

FASTVID_HD void put(float* at, float x) {
    *at = x;
}
FASTVID_HD void put(__half* at, float x) {
    *at = __float2half_rn(x);
}
FASTVID_HD void put(__nv_bfloat16* at, float x) {
    *at = __float2bfloat16_rn(x);
}

FASTVID_HD uint16_t bits_of(__half, float x) {
    return __half_raw(__float2half_rn(x)).x;
}
FASTVID_HD uint16_t bits_of(__nv_bfloat16, float x) {
    return __nv_bfloat16_raw(__float2bfloat16_rn(x)).x;
}

// 16 bytes at once: at is a multiple of 16.
FASTVID_HD void store16(void* at, const uint32_t (&words)[4]) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
#else
    for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(at)[i] = words[i];
#endif
}

template <typename T>
struct alignas(sizeof(T) * kRun <= 16 ? sizeof(T) * kRun : 16) Run {
    T lane[kRun];
};

// Weights k to k + kRun - 1 of the row number `row` that is written; fewer at its end.
template <Format F, typename T>
FASTVID_HD void run(const Matrix& m, T* out, int64_t row, int64_t k, bool whole) {
    T* at = out + row * m.columns + k;
    if (whole) {
        if constexpr (sizeof(T) == 2) {  // one store of 16 bytes, where the compiler would make four of lanes
            uint32_t words[kRun / 2];
#pragma unroll
            for (int i = 0; i < kRun; i += 2) {
                const uint32_t low = bits_of(T(), value<F>(m, m.start + row, k + i));
                words[i / 2] = low | static_cast<uint32_t>(bits_of(T(), value<F>(m, m.start + row, k + i + 1))) << 16;
            }
            store16(at, words);
        } else {
            Run<T> made;
#pragma unroll
            for (int i = 0; i < kRun; ++i) put(&made.lane[i], value<F>(m, m.start + row, k + i));
            *reinterpret_cast<Run<T>*>(at) = made;
        }
        return;
    }
    for (int i = 0; i < kRun && k + i < m.columns; ++i) put(at + i, value<F>(m, m.start + row, k + i));
}

}  // namespace weights
}  // namespace fastvid
