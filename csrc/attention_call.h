// What a caller gives attention, whether it can be done, and what TMA is told of it; host only, no CUDA headers.
#pragma once

#include <cmath>
#include <string>

#include "attention.h"

namespace fastvid::attention {

// q [B, N, H, D], k and v [B, M, H, D], D contiguous; strides of B, tokens, H in elements. Only 64-bit integers, so
// that tests hand it over as an array. tiles is 0 for dense attention; largest: queries of the largest tile.
struct Call {
    int64_t batch, queries, keys, heads, head_dim;
    int64_t q_strides[3], k_strides[3], v_strides[3];
    int64_t tiles, largest, lists;
    int64_t pairs;  // 1: keys and values are read once for two blocks, where it can be
};

// The lists of `Schedule`, where each tile of queries begins, and a counter that is 0; all null for dense attention.
struct Lists {
    const int32_t* query_tiles;
    const int64_t* full_rows;
    const int32_t* full_starts;
    const int64_t* part_rows;
    const int32_t* part_starts;
    const int32_t* part_ends;
    int32_t* given;
};

constexpr int64_t kMostTokens = (int64_t{1} << 31) - 2 * kQueries;  // so that what is beyond the last has a number too

inline std::string refuse_tensor(const std::string& name, const void* base, const int64_t strides[3],
                                 const int64_t extents[3]) {
    if (!aligned(base, kAligned)) return name + " has to begin at a multiple of 16 bytes: a copy does";
    for (int i = 0; i < 3; ++i) {
        const int64_t bytes = strides[i] * kBytes;
        if (extents[i] > 1 && (bytes <= 0 || bytes % kAligned || bytes >= kFarthest)) {
            return name + " has strides [" + std::to_string(strides[0]) + ", " + std::to_string(strides[1]) + ", " +
                   std::to_string(strides[2]) +
                   "] of (B, tokens, H); they have to be positive multiples of 8 below 2^39: a contiguous copy has "
                   "such";
        }
    }
    return "";
}

// Why the kernels cannot do it, and what they could; empty if they can.
inline std::string refuse(const Call& call, const void* q, const void* k, const void* v, const void* out, float scale) {
    if (call.head_dim != 64 && call.head_dim != 128) {
        return "head_dim is " + std::to_string(call.head_dim) +
               "; it can be 64 or 128 (nearest: " + (call.head_dim <= 96 ? "64" : "128") + ")";
    }
    if (call.batch < 1 || call.heads < 1 || call.queries < 1 || call.keys < 1 || call.queries > kMostTokens ||
        call.keys > kMostTokens || call.batch >= 1 << 20 || call.heads >= 1 << 20) {
        return "there are " + std::to_string(call.batch) + " samples of " + std::to_string(call.heads) + " heads, " +
               std::to_string(call.queries) + " queries and " + std::to_string(call.keys) +
               " keys; of each there is at least 1, samples and heads below 2^20, tokens below 2^31 - 256";
    }
    if (!(scale > 0 && scale < INFINITY)) {
        return "softmax_scale is " + std::to_string(scale) + "; the kernel takes positive numbers";
    }
    if (call.tiles && (call.tiles < 0 || call.largest < 1 || call.tiles > call.queries || call.lists < 1 ||
                       (call.lists != 1 && call.lists != call.heads && call.lists != call.heads * call.batch))) {
        return "there are " + std::to_string(call.lists) + " lists for " + std::to_string(call.tiles) +
               " tiles of queries; 1, " + std::to_string(call.heads) + " or " +
               std::to_string(call.heads * call.batch) + " lists fit, and no more tiles than queries";
    }
    const int64_t tile = call.tiles ? call.largest : call.queries;
    const int64_t each = (tile + kQueries - 1) / kQueries * (call.tiles ? call.tiles : 1);
    if (each >= kMostWorks || each * call.heads >= kMostWorks || each * call.heads * call.batch >= kMostWorks) {
        return "there are " + std::to_string(each) + " times 128 queries of " +
               std::to_string(call.heads * call.batch) + " heads; fewer than 2^30 in all fit";
    }
    const int64_t queries[3] = {call.batch, call.queries, call.heads}, keys[3] = {call.batch, call.keys, call.heads};
    std::string why = refuse_tensor("q", q, call.q_strides, queries);
    if (why.empty()) why = refuse_tensor("k", k, call.k_strides, keys);
    if (why.empty()) why = refuse_tensor("v", v, call.v_strides, keys);
    if (why.empty() && !aligned(out, kAligned)) why = "out has to begin at a multiple of 16 bytes";
    return why;
}

inline Attention attention_of(const Call& call, const Lists& lists, float scale) {
    Attention s = {};
    s.batch = static_cast<int>(call.batch);
    s.heads = static_cast<int>(call.heads);
    s.queries = static_cast<int>(call.queries);
    s.keys = static_cast<int>(call.keys);
    s.tiles = call.tiles ? static_cast<int>(call.tiles) : 1;
    s.lists = call.tiles ? static_cast<int>(call.lists) : 1;
    s.parts = divide_up(call.tiles ? static_cast<int>(call.largest) : s.queries, kQueries);
    s.query_tiles = lists.query_tiles;
    s.full_rows = lists.full_rows;
    s.full_starts = lists.full_starts;
    s.part_rows = lists.part_rows;
    s.part_starts = lists.part_starts;
    s.part_ends = lists.part_ends;
    s.given = lists.given;
    s.scale = scale * 1.44269504088896341f;  // log2(e)
    return s;
}

// Keys of a step. Lists are cut into kKeys; dense attention takes as many as the registers have room for.
constexpr int kWideKeys = 176;
inline int keys_of_step(const Call& call) {
    return call.tiles == 0 && call.head_dim == 128 ? kWideKeys : kKeys;
}

// Two blocks of a cluster are neighbours among the queries of a head, so there is an even number of them.
constexpr int kPair = 2;
inline bool paired(const Call& call) {
    return call.pairs && keys_of_step(call) == kWideKeys && (call.queries + kQueries - 1) / kQueries % kPair == 0;
}

// q, k or v as (D, tokens, H, B); a box is 64 columns of `rows` tokens.
inline Map map_of(const Call& call, const void* base, int64_t tokens, const int64_t strides[3], int rows) {
    Map map = {base, 4, {}, {}, {kColumns, static_cast<uint32_t>(rows), 1, 1}, {1, 1, 1, 1, 1}};
    const int64_t extents[4] = {call.head_dim, tokens, call.heads, call.batch};
    const int64_t given[3] = {strides[1], strides[2], strides[0]};
    for (int i = 0; i < 4; ++i) map.extent[i] = static_cast<uint64_t>(extents[i]);
    for (int i = 0; i < 3; ++i) {
        // The stride of a dimension of one says nothing: any that a map can hold will do.
        const int64_t bytes = extents[i + 1] > 1 ? given[i] * kBytes : call.head_dim * kBytes;
        map.stride[i] = static_cast<uint64_t>(bytes);
    }
    return map;
}

}  // namespace fastvid::attention
