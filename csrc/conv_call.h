// What a caller gives a convolution, whether it can be done, and what TMA is told of it; host only, no CUDA headers.
#pragma once

#include <string>

#include "conv.h"

namespace fastvid::conv {

// Activations [B, C, T, H, W] with contiguous channels; strides of B, T, H, W in elements. out: as the caller sees it,
// its pixels and frames doubled. Only 64-bit integers, so that tests hand it over as an array.
struct Call {
    int64_t x[5], x_strides[4];
    int64_t past_strides[4];
    int64_t out[5], out_strides[4];
    int64_t kernel[3];  // kt, kh, kw
    int64_t history, past;
    int64_t pad[2], top;
    int64_t stride, stride_t;
    int64_t doubled, interleaved, add;
};

constexpr int kMostBox = 256;  // elements of a side

inline std::string joined(const int64_t* values, int count) {
    std::string text = "[";
    for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + "]";
}

// Strides that TMA can follow, of those dimensions that have any.
inline std::string refuse_strides(const char* name, const int64_t* strides, const int64_t extents[4]) {
    for (int i = 0; i < 4; ++i) {
        const int64_t bytes = strides[i] * kBytes;
        if (extents[i] > 1 && (bytes <= 0 || bytes % kAligned || bytes >= kFarthest)) {
            return std::string(name) + " has strides " + joined(strides, 4) +
                   " of (B, T, H, W), and channels side by " +
                   "side; they have to be positive multiples of 8 below 2^39: a contiguous channels-last copy has such";
        }
    }
    return "";
}

inline int64_t outputs_of(const Call& call) {
    return call.out[1] * (call.interleaved ? 2 : 1);
}

// Why the kernels cannot do it, and what they could; empty if they can.
inline std::string refuse(const Call& call, const void* x, const void* past, const void* weight, const void* bias,
                          const void* out) {
    const int64_t C = call.x[1], N = call.out[1];
    if (C < 8 || C % 8) {
        return "C is " + std::to_string(C) +
               "; it has to be a multiple of 8 (nearest: " + std::to_string(C < 8 ? 8 : (C + 4) / 8 * 8) + ")";
    }
    if (N < 8 || N % 8) {
        return "the channels of the result are " + std::to_string(N) +
               "; they have to be a multiple of 8 (nearest: " + std::to_string(N < 8 ? 8 : (N + 4) / 8 * 8) + ")";
    }
    for (const int64_t extent : {call.x[0], call.x[2], call.x[3], call.x[4], call.out[2], call.out[3], call.out[4]}) {
        if (extent < 1 || extent >= int64_t{1} << 30) {
            return "x is " + joined(call.x, 5) + " and out " + joined(call.out, 5) + "; sizes go from 1 to 2^30 - 1";
        }
    }
    if (call.stride < 1 || call.stride > 2 || call.stride_t < 1 || call.history < 0) {
        return "strides are " + std::to_string(call.stride) + " in space, " + std::to_string(call.stride_t) +
               " in time; 1 and 2 are made in space, 1 and more in time";
    }
    const int64_t extents[4] = {call.x[0], call.x[2], call.x[3], call.x[4]};
    const int64_t past_extents[4] = {call.x[0], call.history, call.x[3], call.x[4]};
    const int64_t out_extents[4] = {call.out[0], call.out[2], call.out[3], call.out[4]};
    std::string why = refuse_strides("x", call.x_strides, extents);
    if (why.empty() && call.past) why = refuse_strides("past", call.past_strides, past_extents);
    if (!why.empty()) return why;
    why = refuse_strides("out", call.out_strides, out_extents);
    if (!why.empty()) return why;
    if (call.add && (call.doubled || call.interleaved)) {
        return "what is doubled or interleaved cannot be added to what is there";
    }
    if (!aligned(x, kAligned) || !aligned(weight, kAligned) || (call.past && !aligned(past, kAligned)) ||
        !aligned(out, kAligned)) {
        return "x, past, weight and out have to begin at a multiple of 16 bytes";
    }
    if (!aligned(bias, 4)) return "bias has to begin at a multiple of 4 bytes";
    return "";
}

// One box for all taps of a frame, which saves what they have in common, if two such boxes fit; steps in space leave
// too much between their pixels.
inline void choose_box(Conv& s) {
    const int w = s.tile_w + s.kw - 1, h = tile_h(s) + s.kh - 1;
    const bool whole = s.stride == 1 && h * w <= kMostRows && h <= kMostBox && w <= kMostBox;
    s.span_h = whole ? s.kh : 1;
    s.span_w = whole ? s.kw : 1;
    s.box_h = whole ? h : tile_h(s);
    s.box_w = whole ? w : s.tile_w;
}

inline Conv conv_of(const Call& call) {
    const int step = call.doubled ? 2 : 1, halves = call.interleaved ? 2 : 1;
    Conv s = {};
    s.batch = static_cast<int>(call.out[0]);
    s.frames = static_cast<int>(call.out[2] / halves);
    s.height = static_cast<int>(call.out[3] / step);
    s.width = static_cast<int>(call.out[4] / step);
    s.channels = static_cast<int>(call.x[1]);
    s.outputs = static_cast<int>(outputs_of(call));
    s.kt = static_cast<int>(call.kernel[0]);
    s.kh = static_cast<int>(call.kernel[1]);
    s.kw = static_cast<int>(call.kernel[2]);
    s.history = static_cast<int>(call.history);
    s.past = call.past != 0;
    s.first_h = static_cast<int>(call.top - call.pad[0]);
    s.first_w = static_cast<int>(-call.pad[1]);
    s.stride = static_cast<int>(call.stride);
    s.stride_t = static_cast<int>(call.stride_t);
    s.places = step * step;
    s.tile_w = choose_tile_w(s.height, s.width);
    choose_box(s);
    return s;
}

inline Kind kind_of(const Call& call) {
    return call.add ? Kind::kAdd : call.interleaved ? Kind::kSplit : Kind::kPlain;
}

// Extents and strides of a map of [B, T, H, W, C]; the stride of a dimension of one says nothing: what would follow the
// dimensions before it.
inline Map map_of(const void* base, const int64_t (&extents)[5], const int64_t (&strides)[4], const int (&box)[5]) {
    Map map = {base, 5, {}, {}, {}, {1, 1, 1, 1, 1}};
    for (int i = 0; i < 5; ++i) {
        map.extent[i] = static_cast<uint64_t>(extents[i]);
        map.box[i] = static_cast<uint32_t>(box[i]);
    }
    for (int i = 0; i < 4; ++i) {
        const uint64_t natural = map.extent[i] * (i == 0 ? kBytes : map.stride[i - 1]);
        map.stride[i] = map.extent[i + 1] > 1 ? static_cast<uint64_t>(strides[i] * kBytes) : natural;
    }
    return map;
}

// x or past as (C, W, H, T, B); a box lies in one frame.
inline Map map_of_pixels(const Call& call, const Conv& s, const void* base, int64_t frames, const int64_t* strides) {
    Map map = map_of(base, {call.x[1], call.x[4], call.x[3], frames, call.x[0]},
                     {strides[3], strides[2], strides[1], strides[0]},
                     {kChannels, s.box_w * s.stride, s.box_h * s.stride, 1, 1});
    map.every[1] = map.every[2] = static_cast<uint32_t>(s.stride);
    return map;
}

// out as (N, W, H, T, B): those pixels of it that belong to a place, or those frames that belong to a half of the
// channels; a box is a panel of a warpgroup's pixels.
inline int outs_of(const Call& call) {
    return call.doubled ? 4 : call.interleaved ? 2 : 1;
}
inline Map map_of_out(const Call& call, const Conv& s, void* base, int which) {
    const int64_t step = call.doubled ? 2 : 1, halves = call.interleaved ? 2 : 1, *strides = call.out_strides;
    const int64_t first = call.doubled ? which / 2 * strides[2] + which % 2 * strides[3] : which * strides[1];
    return map_of(static_cast<uint16_t*>(base) + first, {call.out[1], s.width, s.height, s.frames, s.batch},
                  {strides[3] * step, strides[2] * step, strides[1] * halves, strides[0]},
                  {kPanel, s.tile_w, kGroupPixels / s.tile_w, 1, 1});
}

// Weights [rows, taps, C] as (C, taps, rows); a box is one tap of a tile's channels.
inline Map map_of_weights(const Call& call, const Conv& s, const void* base, int tile_n) {
    const uint64_t taps = static_cast<uint64_t>(s.kt) * s.kh * s.kw, C = static_cast<uint64_t>(s.channels);
    const uint64_t rows = static_cast<uint64_t>(outputs_of(call)) * s.places;
    const uint32_t box = static_cast<uint32_t>(tile_n);
    return {base, 3, {C, taps, rows}, {C * kBytes, taps * C * kBytes}, {kChannels, 1, box}, {1, 1, 1, 1, 1}};
}

}  // namespace fastvid::conv
