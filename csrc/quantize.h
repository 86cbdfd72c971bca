// 16-bit queries, keys and values -> 8-bit ones, as attention_eight.h takes them.
//
//   q8[n] = q[n] / s[n],  s[n] = max |q[n]| / limit;  shift[n] = q[n] . mean
//   k8[m] = (k[m] - mean) / s[block of m],  s = max |k - mean| / limit
//   v8[m] = v[m] / 2^exponent[block of m], the lowest at which nothing is above 448
//
// limit: 127 for int8, 448 for e4m3; mean: of all keys of a head, which adds the same to all scores of a query, so that
// the softmax does not see it (SageAttention, arXiv 2410.02367). A block: 128 keys that lie together in a tile, the
// last one of a tile filled up with zeros; dense attention has one tile. What is not finite makes its scale NaN, and
// with it every result that it belongs in.
//
//   q [B, N, H, D] -> q8 [B, H, N, D];  k [B, M, H, D] -> k8 [B, H, blocks, 128, D]
//   v [B, M, H, D] -> v8 [B, H, blocks, D, 128], keys in the order of key_of_slot
//
// A block of threads has 128 tokens: D / 8 lanes (16 bytes each) for one, in passes. The host runs the same, thread by
// thread, in the phases between which a block meets.
#pragma once

#include <cmath>
#include <string>

#include "attention_eight.h"

namespace fastvid::quantize {

using attention::kKeys;
using sm90::kAligned;

constexpr int kThreads = 256;
constexpr int kVector = 8;             // values that a lane loads at once
constexpr float kSmallest = 1e-12f;    // of max |x|: products of scales stay far above the smallest float
constexpr int kLowestExponent = -100;  // of values' scale
constexpr float kMostInt8 = 127, kMostE4M3 = 448;

// What a launch is told. Only 64-bit integers and an address, so that tests hand it over as an array. tiles: for each
// of `count` tiles of keys its first one, and the number of keys, int32; null for one tile of all tokens.
struct Call {
    int64_t batch, tokens, heads, head_dim;
    int64_t strides[3];   // of B, tokens, H in elements
    int64_t count, each;  // tiles, and blocks of each
    const int32_t* tiles;
};

struct alignas(16) Vector {
    uint32_t word[kVector / 2];
};

struct Values {
    float at[kVector];
};

// Which tokens a block of threads has: count of them from first on, which may be 0.
struct Block {
    int64_t head, number;  // of batch * heads; of its blocks
    int64_t first, count;
    int64_t offset;  // of the head's first token in the source
};

FASTVID_ANY int64_t blocks(const Call& s) {
    return s.count * s.each;
}

FASTVID_ANY Block block_of(const Call& s, int64_t index) {
    Block made;
    made.number = index % blocks(s);
    made.head = index / blocks(s);
    const int64_t tile = made.number / s.each;
    const int64_t end = s.tiles ? s.tiles[tile + 1] : s.tokens;
    made.first = (s.tiles ? s.tiles[tile] : 0) + made.number % s.each * kKeys;
    made.count = end - made.first;
    if (made.count > kKeys) made.count = kKeys;
    if (made.count < 0) made.count = 0;
    made.offset = made.head / s.heads * s.strides[0] + made.head % s.heads * s.strides[2];
    return made;
}

FASTVID_ANY int lanes(const Call& s) {
    return static_cast<int>(s.head_dim) / kVector;
}
// Of tokens in a pass, and passes.
FASTVID_ANY int token_of(const Call& s, int thread, int pass) {
    return (pass * kThreads + thread) / lanes(s);
}
template <int D>
FASTVID_ANY constexpr int passes() {
    return kKeys * (D / kVector) / kThreads;
}
FASTVID_ANY int column_of(const Call& s, int thread) {
    return thread % lanes(s) * kVector;
}

// Eight columns of a token less the mean's; zeros beyond the block. mean: of the head, or null.
template <typename Hardware>
FASTVID_ANY Values load(const Hardware& hw, const Call& s, const Block& block, const uint16_t* x, const float* mean,
                        int token, int column) {
    Values made = {};
    if (token >= block.count) return made;
    const uint16_t* from = x + block.offset + (block.first + token) * s.strides[1] + column;
    const Vector words = *reinterpret_cast<const Vector*>(from);
    FASTVID_UNROLL
    for (int i = 0; i < kVector / 2; ++i) hw.unpack(words.word[i], made.at[2 * i], made.at[2 * i + 1]);
    if (mean == nullptr) return made;
    FASTVID_UNROLL
    for (int i = 0; i < kVector; ++i) made.at[i] -= mean[block.head * s.head_dim + column + i];
    return made;
}

// max |x|, or NaN if one is: a maximum that forgets it would hide it.
FASTVID_ANY float larger(float a, float b) {
    return a >= b || a != a ? a : b;
}
FASTVID_ANY float most(const Values& values) {
    float made = 0;
    FASTVID_UNROLL
    for (int i = 0; i < kVector; ++i) made = larger(fabsf(values.at[i]), made);
    return made;
}

FASTVID_ANY float scale_of(float most, float limit) {
    return (most < kSmallest ? kSmallest : most) / limit;
}
FASTVID_ANY float inverse_of(float most, float limit) {
    return limit / (most < kSmallest ? kSmallest : most);
}

// The lowest e with most <= 448 * 2^e, or NaN.
FASTVID_ANY float exponent_of(float most) {
    if (!(most <= 3.4e38f)) return NAN;
    int power;
    const float part = frexpf(most, &power);  // in [0.5, 1), or 0; 448 is 0.875 * 2^9
    const int made = power - (part <= 0.875f ? 9 : 8);
    return static_cast<float>(most == 0 || made < kLowestExponent ? kLowestExponent : made);
}

// Two words: eight values in their order.
template <bool Int8, typename Hardware>
FASTVID_ANY void store(const Hardware& hw, const Values& values, float factor, uint8_t* to) {
    uint32_t* words = reinterpret_cast<uint32_t*>(to);
    FASTVID_UNROLL
    for (int i = 0; i < 2; ++i) {
        const float* v = values.at + 4 * i;
        words[i] = hw.template pack8<Int8>(v[0] * factor, v[1] * factor, v[2] * factor, v[3] * factor);
    }
}

// Queries, and keys without a mean: a scale for each. `lane_max` and `lane_sum`: over the lanes of a token, all of
// which come here. shift, and the mean it is made with, may be null.
template <bool Int8, typename Hardware>
FASTVID_ANY void run_queries(const Hardware& hw, const Call& s, int64_t index, int thread, int pass, const uint16_t* x,
                             const float* mean, uint8_t* out, float* scale, float* shift) {
    constexpr float kLimit = Int8 ? kMostInt8 : kMostE4M3;
    const Block block = block_of(s, index);
    const int token = token_of(s, thread, pass), column = column_of(s, thread);
    const Values values = load(hw, s, block, x, nullptr, token, column);
    float product = 0;
    if (shift) {
        FASTVID_UNROLL
        for (int i = 0; i < kVector; ++i) product += values.at[i] * mean[block.head * s.head_dim + column + i];
        product = hw.lane_sum(product, lanes(s));
    }
    const float highest = hw.lane_max(most(values), lanes(s));
    if (token >= block.count) return;
    const int64_t row = block.head * s.tokens + block.first + token;
    store<Int8>(hw, values, inverse_of(highest, kLimit), out + row * s.head_dim + column);
    if (column > 0) return;
    scale[row] = highest <= 3.4e38f ? scale_of(highest, kLimit) : NAN;
    if (shift) shift[row] = product;
}

// Keys: the values of a pass, once the maximum of the block is known.
template <bool Int8, typename Hardware>
FASTVID_ANY void store_keys(const Hardware& hw, const Call& s, int64_t index, int thread, int pass,
                            const Values& values, float highest, uint8_t* out, float* scales) {
    constexpr float kLimit = Int8 ? kMostInt8 : kMostE4M3;
    const int token = token_of(s, thread, pass), column = column_of(s, thread);
    store<Int8>(hw, values, inverse_of(highest, kLimit), out + (index * kKeys + token) * s.head_dim + column);
    if (thread == 0 && pass == 0) scales[2 * index] = highest <= 3.4e38f ? scale_of(highest, kLimit) : NAN;
}

// Values: 16-bit words of a block as [key, column], rows padded so that a column's words lie in different banks.
FASTVID_ANY constexpr int padded(int head_dim) {
    return head_dim + 2;
}

template <typename Hardware>
FASTVID_ANY void keep_values(const Call& s, int thread, int pass, const Hardware& hw, const Values& values,
                             uint16_t* kept) {
    const int at = token_of(s, thread, pass) * padded(static_cast<int>(s.head_dim)) + column_of(s, thread);
    FASTVID_UNROLL
    for (int i = 0; i < kVector; i += 2) {
        *reinterpret_cast<uint32_t*>(kept + at + i) = hw.pack(values.at[i], values.at[i + 1]);
    }
}

// What a thread writes of v8: words of four keys, once all are kept.
template <typename Hardware>
FASTVID_ANY void store_values(const Hardware& hw, const Call& s, int64_t index, int thread, float highest,
                              const uint16_t* kept, uint8_t* out, float* scales) {
    const float exponent = exponent_of(highest);
    const float factor = exponent == exponent ? ldexpf(1, -static_cast<int>(exponent)) : NAN;  // exactly
    const int D = static_cast<int>(s.head_dim);
    uint32_t* to = reinterpret_cast<uint32_t*>(out + index * kKeys * D);
    for (int word = thread; word < D * kKeys / 4; word += kThreads) {
        const int column = word / (kKeys / 4), slot = word % (kKeys / 4) * 4;
        float v[4];
        FASTVID_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int key = attention::key_of_slot(slot + i);
            float unused;
            hw.unpack(kept[key * padded(D) + column], v[i], unused);
        }
        to[word] = hw.template pack8<false>(v[0] * factor, v[1] * factor, v[2] * factor, v[3] * factor);
    }
    if (thread == 0) scales[2 * index + 1] = exponent;
}

// Why the kernels cannot do it; empty if they can.
inline std::string refuse(const Call& s, const void* x) {
    if (s.head_dim != 64 && s.head_dim != 128) {
        return "head_dim is " + std::to_string(s.head_dim) +
               "; it can be 64 or 128 (nearest: " + (s.head_dim <= 96 ? "64" : "128") + ")";
    }
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;  // blocks of a grid
    for (const int64_t size : {s.batch, s.heads, s.tokens, s.count, s.each}) {
        if (size < 1 || size > kMost) return "sizes are " + std::to_string(size) + " and the like; 1 to 2^31 - 1 fit";
    }
    if (blocks(s) > kMost / s.batch / s.heads) {
        return "there are " + std::to_string(s.batch) + " samples of " + std::to_string(s.heads) + " heads of " +
               std::to_string(blocks(s)) + " blocks of 128 tokens; fewer than 2^31 blocks fit in a launch";
    }
    if (!sm90::aligned(x, kAligned)) return "tensors have to begin at a multiple of 16 bytes: a copy does";
    const int64_t extents[3] = {s.batch, s.tokens, s.heads};
    for (int i = 0; i < 3; ++i) {
        if (extents[i] > 1 && s.strides[i] % kVector) {
            return "strides have to be multiples of 8, and one is " + std::to_string(s.strides[i]) +
                   ": a contiguous copy has such";
        }
    }
    return "";
}

}  // namespace fastvid::quantize
