// RMS norm over the channels of each pixel, then SiLU or not, into memory of its own; channels lie side by side.
//
//   y = x * sqrt(C / max(sum over c of x^2, 1e-24)) * gamma;   out = y, or y / (1 + exp(-y));   in fp32
//
// A group of lanes has a pixel, each of them some eights of channels (16 bytes), which stay in registers between the
// sum and the store. The square root, the exponent and the reciprocal are those of the special function unit, whose
// relative errors are at most 2^-22, so that SiLU of y is off by at most (|y| + 4) 2^-23 of itself: a 16-bit result has
// 2^-12 at best. The host runs the same with groups of one.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "conv_call.h"

namespace fastvid::norm {

constexpr int kVector = 8;                     // channels that a lane loads at once
constexpr int kMostLanes = 32;                 // of a pixel
constexpr int kPixels = 4;                     // of a thread, one after another, for one load of gamma
constexpr int64_t kNear = (int64_t{1} << 31);  // pixels from which on 32 bits do not count them

// Sizes and strides (of B, T, H, W, in elements) of x and of out.
struct Norm {
    int64_t size[4];
    int64_t channels;
    int64_t x[4], out[4];
    int64_t silu;
};

// What a launch is told: as above, with dimensions of one stride as one.
struct Plan {
    int64_t size[4], x[4], out[4];
    int64_t pixels;
    int flat;     // 1: the last dimension holds all pixels
    int vectors;  // of a pixel
    int log_lanes;
    int many;    // vectors of a lane that registers hold: 3 or 4
    int wide;    // 1: a lane has more than those, or 32 bits do not count the pixels
    float each;  // 1 / C
};

struct alignas(16) Vector {
    uint32_t word[kVector / 2];
};

// What a lane has of a pixel, or of gamma.
template <int Many>
struct Part {
    Vector vector[Many];
};

struct Offsets {
    int64_t x, out;
};

// As few lanes as leave each at most 4 vectors; 3 of them where that is enough, as 96, 192 and 384 channels have.
inline void share_vectors(Plan& s) {
    s.log_lanes = 0;
    while (1 << s.log_lanes < kMostLanes && s.vectors > 4 << s.log_lanes) ++s.log_lanes;
    s.many = s.vectors > 3 << s.log_lanes ? 4 : 3;
}

inline Plan plan_of(const Norm& norm) {
    Plan s = {{1, 1, 1, 1}, {}, {}, 1, 1, static_cast<int>(norm.channels / kVector), 0, 0, 0, 1.0f / norm.channels};
    int at = 4;  // where the last dimension that was kept lies
    for (int i = 3; i >= 0; --i) {
        s.pixels *= norm.size[i];
        if (norm.size[i] == 1) continue;
        const bool same = at < 4 && norm.x[i] == s.size[at] * s.x[at] && norm.out[i] == s.size[at] * s.out[at];
        if (same) {
            s.size[at] *= norm.size[i];
            continue;
        }
        --at;
        s.size[at] = norm.size[i];
        s.x[at] = norm.x[i];
        s.out[at] = norm.out[i];
    }
    s.flat = at >= 3;
    share_vectors(s);
    s.wide = s.vectors > s.many << s.log_lanes || s.pixels >= kNear;
    return s;
}

// Index: the integers that pixels are counted in. Offsets have 64 bits in any case.
template <typename Index>
FASTVID_ANY Offsets offsets_of(const Plan& s, Index pixel) {
    if (s.flat) return {int64_t{pixel} * s.x[3], int64_t{pixel} * s.out[3]};
    Offsets made = {0, 0};
    Index rest = pixel;
    FASTVID_UNROLL
    for (int i = 3; i > 0; --i) {
        const Index size = static_cast<Index>(s.size[i]), before = rest / size;
        const int64_t place = rest - before * size;
        made.x += place * s.x[i];
        made.out += place * s.out[i];
        rest = before;
    }
    made.x += int64_t{rest} * s.x[0];
    made.out += int64_t{rest} * s.out[0];
    return made;
}

// The vectors of a lane, from `first` on; zeros beyond the last. from: where a pixel begins.
template <int Many>
FASTVID_ANY Part<Many> load(const Plan& s, const uint16_t* from, int lane, int first, bool inside) {
    Part<Many> part = {};
    FASTVID_UNROLL
    for (int i = 0; i < Many; ++i) {
        const int at = first + (i << s.log_lanes) + lane;
        if (inside && at < s.vectors) part.vector[i] = reinterpret_cast<const Vector*>(from)[at];
    }
    return part;
}

template <int Many>
FASTVID_ANY void store(const Plan& s, const Part<Many>& part, uint16_t* to, int lane, int first) {
    FASTVID_UNROLL
    for (int i = 0; i < Many; ++i) {
        const int at = first + (i << s.log_lanes) + lane;
        if (at < s.vectors) reinterpret_cast<Vector*>(to)[at] = part.vector[i];
    }
}

template <int Many, typename Math>
FASTVID_ANY float squares_of(const Math& math, const Part<Many>& part) {
    float squares[2] = {0, 0};
    FASTVID_UNROLL
    for (int i = 0; i < Many * kVector / 2; ++i) {
        float a, b;
        math.unpack(part.vector[i / 4].word[i % 4], a, b);
        squares[0] += a * a;
        squares[1] += b * b;
    }
    return squares[0] + squares[1];
}

template <typename Math>
FASTVID_ANY float silu(const Math& math, float y) {
    return y * math.reciprocal(1.0f + math.exp2(y * -1.44269504f));
}

template <bool Silu, int Many, typename Math>
FASTVID_ANY void scale_by(const Math& math, Part<Many>& part, const Part<Many>& gamma, float scale) {
    FASTVID_UNROLL
    for (int i = 0; i < Many * kVector / 2; ++i) {
        uint32_t& word = part.vector[i / 4].word[i % 4];
        float value[2], factor[2];
        math.unpack(word, value[0], value[1]);
        math.unpack(gamma.vector[i / 4].word[i % 4], factor[0], factor[1]);
        FASTVID_UNROLL
        for (int j = 0; j < 2; ++j) {
            value[j] *= scale * factor[j];
            if (Silu) value[j] = silu(math, value[j]);
        }
        word = math.pack(value[0], value[1]);
    }
}

template <typename Math>
FASTVID_ANY float scale_of(const Math& math, const Plan& s, float squares) {
    return math.rsqrt(fmaxf(squares, 1e-24f) * s.each);
}

// A pixel whose vectors registers hold. sum: over the lanes of the pixel; every one of them has to come here.
template <bool Silu, int Many, typename Math, typename Sum>
FASTVID_ANY void run(const Math& math, const Plan& s, Part<Many> part, const Part<Many>& gamma, uint16_t* to, int lane,
                     bool inside, Sum sum) {
    const float squares = sum(squares_of(math, part));
    if (!inside) return;
    scale_by<Silu>(math, part, gamma, scale_of(math, s, squares));
    store(s, part, to, lane, 0);
}

// One of any width: its vectors are read twice.
template <bool Silu, int Many, typename Math, typename Sum>
FASTVID_ANY void run_wide(const Math& math, const Plan& s, const uint16_t* from, const uint16_t* gamma, uint16_t* to,
                          int lane, bool inside, Sum sum) {
    const int turn = Many << s.log_lanes;
    float squares = 0;
    for (int first = 0; first < s.vectors; first += turn) {
        squares += squares_of(math, load<Many>(s, from, lane, first, inside));
    }
    squares = sum(squares);
    if (!inside) return;
    const float scale = scale_of(math, s, squares);
    for (int first = 0; first < s.vectors; first += turn) {
        Part<Many> part = load<Many>(s, from, lane, first, true);
        scale_by<Silu>(math, part, load<Many>(s, gamma, lane, first, true), scale);
        store(s, part, to, lane, first);
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
