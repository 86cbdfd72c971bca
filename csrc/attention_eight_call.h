// What a caller gives attention of 8-bit values, and what TMA is told of it; host only, no CUDA headers.
#pragma once

#include "attention_call.h"
#include "quantize.h"

namespace fastvid::attention {

// The scale of a softmax is so far from 0 that products of three scales are floats.
constexpr float kSmallestScale = 1e-6f, kLargestScale = 1e6f;

// What quantize.h made of q, k and v; `call` has the strides of what it was made of. Dense attention has no lists;
// those of tiles count keys in k8, where each tile begins at a block.
struct Eights {
    const void *q, *k, *v;
    Scales scales;
};

inline std::string refuse_eight(const Call& call, const Scales& scales, const void* out, float scale) {
    if (!(scale >= kSmallestScale && scale <= kLargestScale)) {
        return "softmax_scale is " + std::to_string(scale) + "; 8-bit attention takes 1e-6 to 1e6";
    }
    const int64_t keys = call.tiles ? 1 : call.keys;
    if (scales.count < 1 || (scales.count - 1) * int64_t{kKeys} >= kMostTokens ||
        int64_t{kKeys} * scales.count < keys) {
        return std::to_string(scales.count) + " blocks of 128 keys do not hold " + std::to_string(call.keys) + " keys";
    }
    return refuse(call, out, out, out, out, scale);
}

inline Attention attention_of(const Call& call, const Lists& lists, const Scales& scales, float scale) {
    Attention s = attention_of(call, lists, scale);
    s.scales = scales;
    return s;
}

// [B, H, rows, columns] of bytes, as (columns, rows, H, B); a box is `box` whole rows.
inline Map map_of_bytes(const Call& call, const void* base, int64_t rows, int columns, int box) {
    Map map = {base, 4, {}, {}, {}, {1, 1, 1, 1, 1}, 1};
    const int64_t extents[4] = {columns, rows, call.heads, call.batch};
    int64_t stride = 1;
    for (int i = 0; i < 4; ++i) {
        map.extent[i] = static_cast<uint64_t>(extents[i]);
        stride *= extents[i];
        if (i < 3) map.stride[i] = static_cast<uint64_t>(stride);
        map.box[i] = 1;
    }
    map.box[0] = static_cast<uint32_t>(columns);
    map.box[1] = static_cast<uint32_t>(box);
    return map;
}
inline Map map_of_queries(const Call& call, const Eights& at) {
    return map_of_bytes(call, at.q, call.queries, static_cast<int>(call.head_dim), kQueries);
}
inline Map map_of_keys(const Call& call, const Eights& at) {
    return map_of_bytes(call, at.k, int64_t{1} * at.scales.count * kKeys, static_cast<int>(call.head_dim), kKeys);
}
inline Map map_of_values(const Call& call, const Eights& at) {
    return map_of_bytes(call, at.v, at.scales.count * call.head_dim, kKeys, static_cast<int>(call.head_dim));
}

}  // namespace fastvid::attention
