// RMS norm over the channels of each pixel, then SiLU or not, into memory of its own; channels lie side by side.
//
//   y = x * sqrt(C / max(sum over c of x^2, 1e-24)) * gamma;   out = y, or y / (1 + exp(-y));   in IEEE fp32
//
// A group of lanes has a pixel, each of them eights of channels (16 bytes). The host runs the same with groups of one.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "conv_call.h"

namespace fastvid::norm {

constexpr int kVector = 8;  // channels that a lane loads at once

// Sizes and strides (of B, T, H, W, in elements) of x and of out.
struct Norm {
    int64_t size[4];
    int64_t channels;
    int64_t x[4], out[4];
    int64_t silu;
};

struct alignas(16) Vector {
    uint32_t word[kVector / 2];
};

FASTVID_ANY int64_t pixels(const Norm& s) {
    return s.size[0] * s.size[1] * s.size[2] * s.size[3];
}

FASTVID_ANY int64_t offset_of(const Norm& s, const int64_t* strides, int64_t pixel) {
    const int64_t w = pixel % s.size[3], h = pixel / s.size[3] % s.size[2];
    const int64_t frame = pixel / (s.size[3] * s.size[2]);
    return frame / s.size[1] * strides[0] + frame % s.size[1] * strides[1] + h * strides[2] + w * strides[3];
}

// Lanes of a pixel: the power of 2 from 1 to 32 that leaves none without an eight, or as few as that gives.
inline int lanes_of(int64_t channels) {
    int lanes = 1;
    while (lanes < 32 && lanes * kVector < channels) lanes *= 2;
    return lanes;
}

// What `lane` of `lanes` does for a pixel. sum: over the lanes of the pixel; every one of them has to come here.
template <typename Words, typename Sum>
FASTVID_ANY void run(const Words& words, const Norm& s, const uint16_t* x, const uint16_t* gamma, uint16_t* out,
                     int64_t pixel, int lane, int lanes, Sum sum) {
    const bool inside = pixel < pixels(s);
    const uint16_t* from = x + (inside ? offset_of(s, s.x, pixel) : 0);
    float squares = 0;
    for (int64_t c = lane * kVector; inside && c < s.channels; c += lanes * kVector) {
        const Vector values = *reinterpret_cast<const Vector*>(from + c);
        FASTVID_UNROLL
        for (int i = 0; i < kVector / 2; ++i) {
            float a, b;
            words.unpack(values.word[i], a, b);
            squares += a * a + b * b;
        }
    }
    squares = sum(squares);
    if (!inside) return;
    const float scale = sqrtf(static_cast<float>(s.channels) / fmaxf(squares, 1e-24f));
    uint16_t* to = out + offset_of(s, s.out, pixel);
    for (int64_t c = lane * kVector; c < s.channels; c += lanes * kVector) {
        Vector values = *reinterpret_cast<const Vector*>(from + c);
        const Vector factors = *reinterpret_cast<const Vector*>(gamma + c);
        FASTVID_UNROLL
        for (int i = 0; i < kVector / 2; ++i) {
            float value[2], factor[2];
            words.unpack(values.word[i], value[0], value[1]);
            words.unpack(factors.word[i], factor[0], factor[1]);
            FASTVID_UNROLL
            for (int j = 0; j < 2; ++j) {
                value[j] *= scale * factor[j];
                if (s.silu) value[j] /= 1.0f + expf(-value[j]);
            }
            values.word[i] = words.pack(value[0], value[1]);
        }
        *reinterpret_cast<Vector*>(to + c) = values;
    }
}

// Why the kernel cannot do it; empty if it can.
inline std::string refuse(const Norm& s, const void* x, const void* gamma, const void* out) {
    if (s.channels < kVector || s.channels % kVector) {
        return "C is " + std::to_string(s.channels) + "; it has to be a multiple of 8 (nearest: " +
               std::to_string(s.channels < 8 ? 8 : (s.channels + 4) / 8 * 8) + ")";
    }
    for (int i = 0; i < 4; ++i) {
        if (s.size[i] < 1) return "x has the sizes " + conv::joined(s.size, 4) + "; they have to be at least 1";
        if (s.size[i] > 1 && (s.x[i] % kVector || s.out[i] % kVector)) {
            return "x and out have strides " + conv::joined(s.x, 4) + " and " + conv::joined(s.out, 4) +
                   " of (B, T, H, W); they have to be multiples of 8, and channels side by side";
        }
    }
    if (!conv::aligned(x, 16) || !conv::aligned(gamma, 16) || !conv::aligned(out, 16)) {
        return "x, gamma and out have to begin at a multiple of 16 bytes";
    }
    return "";
}

}  // namespace fastvid::norm
