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
constexpr int kKeys = 128;                     // of a step over lists, or with 8 bits: what lists are cut into
constexpr int kGroups = 2;                     // of consumers
constexpr int kWarps = kGroups * 4;            // of them
constexpr int kThreads = 128 * (1 + kGroups);  // a warpgroup is the producer
constexpr int kSmem = 227 * 1024;              // that a block can have
constexpr int kBarrierBytes = 1024;            // behind the ring

// Registers of a thread of the producer and of the consumers: these take what that one gives back of the launch's.
struct RegisterSplit {
    int producer, consumer;
};
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
FASTVID_ANY constexpr bool fit(const RegisterSplit& registers) {
    // Warpgroups that ask for more than was given back wait for ever.
    return registers.producer + kGroups * registers.consumer <= (1 + kGroups) * kLaunchRegisters;
}

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
    int32_t* given;  // works that blocks asked for beyond their first one; null: they are dealt out in turn
    float scale;     // times log2(e)
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
constexpr int64_t kMostWorks = 1 << 30;  // numbers of works, and what follows the last ones, are 32-bit integers

FASTVID_ANY Work work_of(const Attention& s, int number) {
    Work work;
    const int part = take(number, s.parts), tile = take(number, s.tiles);
    int head = number;
    work.row = int64_t{1} * take(head, s.lists) * s.tiles + tile;
    work.head = take(number, s.heads);
    work.batch = number;
    const int end = s.query_tiles ? s.query_tiles[tile + 1] : s.queries;
    work.first = (s.query_tiles ? s.query_tiles[tile] : 0) + part * kQueries;
    work.end = end < work.first + kQueries ? end : work.first + kQueries;
    return work;
}

// Here and below, `keys` are those of a step: kKeys where there are lists.
FASTVID_ANY Walk walk_of(const Attention& s, const Work& work, int keys) {
    if (work.first >= work.end) return {0, 0, 0, 0};
    if (!s.query_tiles) return {0, 0, s.keys / keys, divide_up(s.keys, keys)};
    Walk walk;
    walk.full = s.full_rows[work.row];
    walk.part = s.part_rows[work.row];
    walk.fulls = static_cast<int>(s.full_rows[work.row + 1] - walk.full);
    walk.steps = walk.fulls + static_cast<int>(s.part_rows[work.row + 1] - walk.part);
    return walk;
}

FASTVID_ANY int first_key(const Attention& s, const Walk& walk, int step, int keys) {
    if (!s.query_tiles) return step * keys;
    return step < walk.fulls ? s.full_starts[walk.full + step] : s.part_starts[walk.part + step - walk.fulls];
}

FASTVID_ANY int key_count(const Attention& s, const Walk& walk, int step, int keys) {
    if (step < walk.fulls) return keys;
    if (!s.query_tiles) return s.keys - step * keys;
    const int64_t part = walk.part + step - walk.fulls;
    return s.part_ends[part] - s.part_starts[part];
}

// Shared memory: queries, a ring of keys, a ring of values, barriers. In bytes: of the queries, and of the keys or
// values of a step.
struct Room {
    int queries, tile;

    FASTVID_ANY constexpr int stages() const {
        const int fit = (kSmem - kBarrierBytes - queries) / (2 * tile);
        return fit < 4 ? fit : 4;
    }
    FASTVID_ANY constexpr int keys_at(int stage) const { return queries + stage * tile; }
    FASTVID_ANY constexpr int values_at(int stage) const { return keys_at(stages() + stage); }
    FASTVID_ANY constexpr int barriers_at() const { return values_at(stages()); }
    FASTVID_ANY constexpr int number_at() const { return barriers_at() + kBarrierBytes - 8; }  // of a work
    FASTVID_ANY constexpr int bytes() const { return barriers_at() + kBarrierBytes; }
};
FASTVID_ANY constexpr Room room_of(int keys, int head_dim, int value_bytes) {
    return {kQueries * head_dim * value_bytes, keys * head_dim * value_bytes};
}

// Numbers of barriers: full ones are for the producer's bytes, empty ones for the consumers' warps.
enum Kind : int {
    kQueryFull,
    kQueryEmpty,
    kKeyFull,
    kKeyEmpty,
    kValueFull,
    kValueEmpty,
    kWorkFull,  // of the number of a work
    kWorkEmpty,
    kKinds
};

FASTVID_ANY constexpr int barrier_of(Kind kind, int stage = 0) {
    return stage * kKinds + kind;
}
FASTVID_ANY constexpr int barriers(const Room& room) {
    return room.stages() * kKinds;
}
// blocks: of a cluster, which read the same keys and values. Each loads a part of them for all.
FASTVID_ANY constexpr int arrivals(int barrier, int blocks) {
    const int kind = barrier % kKinds;
    return kind % 2 == 0 ? 1 : kind == kKeyEmpty || kind == kValueEmpty ? kWarps * blocks : kWarps;
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
