// Where everything of an attention lies: which queries a block takes, which keys it walks over, what is in shared
// memory. Host and device compile the same functions; nothing here needs CUDA's headers.
//
//   out[b, n, h] = sum_m p[m] v[b, m, h] / sum_m p[m],  p[m] = exp(scale * q[b, n, h] . k[b, m, h])
//   lse[b, h, n] = log(sum_m p[m])
//
// over all keys m, or over those that are listed for n's tile of queries: blocks of 128 keys that lie together, and
// parts of such blocks (kernels/sparse_attention.py cuts the lists of `Blocks` into them).
#pragma once

#include "sm90_layout.h"

namespace fastvid::attention {

using namespace sm90;

constexpr int kQueries = 128;                  // of a block: 64 for each of two consumer warpgroups
constexpr int kKeys = 128;                     // of a step
constexpr int kGroups = 2;                     // of consumers
constexpr int kWarps = kGroups * 4;            // of them
constexpr int kThreads = 128 * (1 + kGroups);  // a warpgroup is the producer
constexpr int kSmem = 227 * 1024;              // that a block can have
constexpr int kBarrierBytes = 1024;            // behind the ring
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

static_assert(kQueries == kKeys, "queries, keys and values have one form of box");
static_assert(128 * (kProducerRegisters + kGroups * kConsumerRegisters) <= 65536, "registers of a multiprocessor");

// What 8-bit values were divided by; null for 16-bit ones. attention_eight.h has the formula.
struct Scales {
    const float* queries;  // [batch, heads, queries]
    const float* shifts;   // [batch, heads, queries], or null: to be added to the scores of a query
    const float* blocks;   // [batch, heads, blocks, 2]: of 128 keys, and the exponent of that of their values
    int count;             // of blocks
};

// What a launch makes. Without query_tiles all keys are seen; the lists are those of `Schedule`.
struct Attention {
    int batch, heads, queries, keys;
    int tiles, parts, lists;  // tiles of queries, blocks of each, lists of their keys: 1, heads, or batch * heads
    const int32_t* query_tiles;
    const int64_t* full_rows;
    const int32_t* full_starts;
    const int64_t* part_rows;
    const int32_t* part_starts;
    const int32_t* part_ends;
    float scale;  // times log2(e)
    Scales scales;
};

// Queries first to end (not with it) of one head; row: of the lists. There may be none: a tile with fewer parts.
struct Work {
    int batch, head, first, end;
    int64_t row;
};

// Steps over keys: whole blocks, then parts; where they begin in the lists.
struct Walk {
    int64_t full, part;
    int fulls, steps;
};

// Blocks of queries that read the same keys follow one another: parts first, then tiles, heads, batch.
FASTVID_ANY int64_t works(const Attention& s) {
    return int64_t{1} * s.parts * s.tiles * s.heads * s.batch;
}

FASTVID_ANY Work work_of(const Attention& s, int64_t number) {
    Work work;
    const int part = take(number, s.parts), tile = take(number, s.tiles);
    work.head = take(number, s.heads);
    work.batch = static_cast<int>(number);
    const int end = s.query_tiles ? s.query_tiles[tile + 1] : s.queries;
    work.first = (s.query_tiles ? s.query_tiles[tile] : 0) + part * kQueries;
    work.end = end < work.first + kQueries ? end : work.first + kQueries;
    work.row = (int64_t{1} * work.batch * s.heads + work.head) % s.lists * s.tiles + tile;
    return work;
}

FASTVID_ANY Walk walk_of(const Attention& s, const Work& work) {
    if (work.first >= work.end) return {0, 0, 0, 0};
    if (!s.query_tiles) return {0, 0, s.keys / kKeys, divide_up(s.keys, kKeys)};
    Walk walk;
    walk.full = s.full_rows[work.row];
    walk.part = s.part_rows[work.row];
    walk.fulls = static_cast<int>(s.full_rows[work.row + 1] - walk.full);
    walk.steps = walk.fulls + static_cast<int>(s.part_rows[work.row + 1] - walk.part);
    return walk;
}

FASTVID_ANY int first_key(const Attention& s, const Walk& walk, int step) {
    if (!s.query_tiles) return step * kKeys;
    return step < walk.fulls ? s.full_starts[walk.full + step] : s.part_starts[walk.part + step - walk.fulls];
}

FASTVID_ANY int key_count(const Attention& s, const Walk& walk, int step) {
    if (step < walk.fulls) return kKeys;
    if (!s.query_tiles) return s.keys - step * kKeys;
    const int64_t part = walk.part + step - walk.fulls;
    return s.part_ends[part] - s.part_starts[part];
}

// Shared memory: queries, a ring of keys, a ring of values, barriers. A tile is 128 queries, keys or values; `tile` its
// bytes.
FASTVID_ANY constexpr int tile_bytes(int head_dim, int value_bytes) {
    return kKeys * head_dim * value_bytes;
}
FASTVID_ANY constexpr int stages(int tile) {
    const int fit = (kSmem - kBarrierBytes - tile) / (2 * tile);
    return fit < 4 ? fit : 4;
}
FASTVID_ANY constexpr int keys_at(int tile, int stage) {
    return (1 + stage) * tile;
}
FASTVID_ANY constexpr int values_at(int tile, int stage) {
    return keys_at(tile, stages(tile) + stage);
}
FASTVID_ANY constexpr int barriers_at(int tile) {
    return values_at(tile, stages(tile));
}
FASTVID_ANY constexpr int smem_bytes(int tile) {
    return barriers_at(tile) + kBarrierBytes;
}

// Numbers of barriers: full ones are for the producer's bytes, empty ones for the consumers' warps.
enum Kind : int { kQueryFull, kQueryEmpty, kKeyFull, kKeyEmpty, kValueFull, kValueEmpty, kKinds };

FASTVID_ANY constexpr int barrier_of(Kind kind, int stage = 0) {
    return stage * kKinds + kind;
}
FASTVID_ANY constexpr int barriers(int tile) {
    return stages(tile) * kKinds;
}
FASTVID_ANY constexpr int arrivals(int barrier) {
    return barrier % kKinds % 2 ? kWarps : 1;
}

// A stage of a ring of `Stages`, and the parity of its round.
template <int Stages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    FASTVID_ANY Ring next() const {
        Ring after = {stage + 1, parity};
        if (after.stage == Stages) after = {0, parity ^ 1};
        return after;
    }
};

}  // namespace fastvid::attention
