// A block of attention, for any hardware: sm_90a (attention_sm90.h) or one that tests interpret on the CPU.
//
// One warpgroup is the producer: TMA loads 128 queries, and 128 keys and 128 values a step into rings of stages. Two
// warpgroups are consumers: each has 64 queries. While one makes the softmax of its scores, the other has the matrix
// units: they take turns. Within a group, the product of weights and values of a step runs behind the scores of the
// next. Sums and maxima are fp32; weights are rounded to 16 bits and stay in registers.
//
// A hardware has wait(barrier, parity), expect(barrier, bytes), load(tensor, at, barrier, column, row, head, batch),
// arrive(barrier) once a warp, turn(group) and pass(group); Scores, Output, Weights, Rows with at(thread, i);
// each(f), which calls f(thread) for every thread; quad_max, quad_sum over the four threads that share rows; address,
// begin(x), scores<Add>(x, a, b), values(x, weights, step, b), commit(), drain<pending>(x); exp2, log2, pack.
#pragma once

#include <cmath>

#include "attention.h"

namespace fastvid::attention {

enum Tensor : int { kQuery, kKey, kValue };

template <int D, typename Hardware>
FASTVID_ANY void load_tile(Hardware& hw, Tensor tensor, int at, int barrier, int row, const Work& work) {
    hw.expect(barrier, tile_bytes(D));
    FASTVID_UNROLL
    for (int panel = 0; panel < D / kColumns; ++panel) {
        hw.load(tensor, at + panel * kPanel, barrier, panel * kColumns, row, work.head, work.batch);
    }
}

// The producer's loop over the works of a block: number, number + every, ...
template <int D, typename Hardware>
FASTVID_ANY void produce(Hardware& hw, const Attention& s, int64_t number, int64_t every) {
    Ring<stages(D)> ring;
    uint32_t parity = 0;
    for (const int64_t end = works(s); number < end; number += every) {
        const Work work = work_of(s, number);
        const Walk walk = walk_of(s, work);
        if (walk.steps == 0) continue;
        hw.wait(barrier_of(kQueryEmpty), parity ^ 1);
        load_tile<D>(hw, kQuery, 0, barrier_of(kQueryFull), work.first, work);
        parity ^= 1;
        for (int step = 0; step < walk.steps; ++step) {
            const int row = first_key(s, walk, step);
            hw.wait(barrier_of(kKeyEmpty, ring.stage), ring.parity ^ 1);
            load_tile<D>(hw, kKey, keys_at(D, ring.stage), barrier_of(kKeyFull, ring.stage), row, work);
            hw.wait(barrier_of(kValueEmpty, ring.stage), ring.parity ^ 1);
            load_tile<D>(hw, kValue, values_at(D, ring.stage), barrier_of(kValueFull, ring.stage), row, work);
            ring = ring.next();
        }
    }
}

// scores[64, keys] = the group's queries . keys, without waiting for it.
template <int D, typename Hardware>
FASTVID_ANY void score(Hardware& hw, typename Hardware::Scores& scores, int group, int stage) {
    const uint32_t queries = hw.address(group * (kQueries / kGroups) * kRow);
    const uint32_t keys = hw.address(keys_at(D, stage));
    hw.begin(scores);
    FASTVID_UNROLL
    for (int k = 0; k < D / kDepth; ++k) {
        const uint32_t at = k * kDepth / kColumns * kPanel + k * kDepth % kColumns * kBytes;
        if (k == 0) {
            hw.template scores<false>(scores, descriptor(queries + at), descriptor(keys + at));
        } else {
            hw.template scores<true>(scores, descriptor(queries + at), descriptor(keys + at));
        }
    }
    hw.commit();
}

// output[64, D] += weights . values, without waiting for it.
template <int D, typename Hardware>
FASTVID_ANY void weigh(Hardware& hw, typename Hardware::Output& output, typename Hardware::Weights& weights,
                       int stage) {
    const uint32_t values = hw.address(values_at(D, stage));
    hw.begin(output);
    hw.begin(weights);
    FASTVID_UNROLL
    for (int k = 0; k < kKeys / kDepth; ++k) {
        hw.values(output, weights, k, transposed_descriptor(values + k * kDepth * kRow, kPanel));
    }
    hw.commit();
}

// Scores become powers of two below the row's highest score so far; `shrink` is what makes older sums smaller by.
template <typename Hardware>
FASTVID_ANY void softmax(Hardware& hw, typename Hardware::Scores& scores, typename Hardware::Rows& highest,
                         typename Hardware::Rows& total, typename Hardware::Rows& shrink, int count, float scale) {
    typename Hardware::Rows found;
    if (count < kKeys) {
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int i = 0; i < kKeys / 2; ++i) {
                if (column_of(thread, i / 4) + i % 2 >= count) scores.at(thread, i) = -INFINITY;
            }
        });
    }
    hw.each([&](int thread) {
        FASTVID_UNROLL
        for (int half = 0; half < 2; ++half) {
            float most = highest.at(thread, half);
            FASTVID_UNROLL
            for (int i = half * 2; i < kKeys / 2; i += 4) {
                most = hw.max(most, hw.max(scores.at(thread, i), scores.at(thread, i + 1)));
            }
            found.at(thread, half) = most;
        }
    });
    hw.quad_max(found);
    hw.each([&](int thread) {
        FASTVID_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float most = found.at(thread, half), base = most * scale;
            shrink.at(thread, half) = hw.exp2(highest.at(thread, half) * scale - base);
            highest.at(thread, half) = most;
            float sum = 0;
            FASTVID_UNROLL
            for (int i = half * 2; i < kKeys / 2; i += 4) {
                FASTVID_UNROLL
                for (int j = i; j < i + 2; ++j) {
                    scores.at(thread, j) = hw.exp2(scores.at(thread, j) * scale - base);
                    sum += scores.at(thread, j);
                }
            }
            total.at(thread, half) = total.at(thread, half) * shrink.at(thread, half) + sum;
        }
    });
}

// The left matrix of the next product: a register for two neighbouring keys of a row.
template <typename Hardware>
FASTVID_ANY void round_weights(Hardware& hw, typename Hardware::Scores& scores, typename Hardware::Weights& weights) {
    hw.each([&](int thread) {
        FASTVID_UNROLL
        for (int i = 0; i < kKeys / 4; ++i) {
            weights.at(thread, i) = hw.pack(scores.at(thread, 2 * i), scores.at(thread, 2 * i + 1));
        }
    });
}

template <int D, typename Hardware>
FASTVID_ANY void shrink_output(Hardware& hw, typename Hardware::Output& output, typename Hardware::Rows& shrink) {
    hw.each([&](int thread) {
        FASTVID_UNROLL
        for (int i = 0; i < D / 2; ++i) output.at(thread, i) *= shrink.at(thread, i / 2 % 2);
    });
}

// out [B, N, H, D] and, if there is one, lse [B, H, N]; without any keys 0 and -inf.
template <int D, typename Hardware>
FASTVID_ANY void store(Hardware& hw, const Attention& s, const Work& work, int group, bool nothing,
                       typename Hardware::Output& output, typename Hardware::Rows& highest,
                       typename Hardware::Rows& total, uint16_t* out, float* lse) {
    hw.quad_sum(total);
    hw.each([&](int thread) {
        FASTVID_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int query = work.first + group * (kQueries / kGroups) + row_of(thread, half);
            if (query >= work.end) continue;
            const int64_t token = (int64_t{1} * work.batch * s.queries + query) * s.heads + work.head;
            uint32_t* to = reinterpret_cast<uint32_t*>(out + token * D + column_of(thread, 0));
            const float sum = total.at(thread, half), inverse = nothing ? 0.0f : 1.0f / sum;
            FASTVID_UNROLL
            for (int i = 0; i < D / 8; ++i) {
                const int at = i * 4 + half * 2;
                to[i * 4] = hw.pack(output.at(thread, at) * inverse, output.at(thread, at + 1) * inverse);
            }
            if (lse && thread % 4 == 0) {
                constexpr float kLog2 = 0.693147180559945309f;
                lse[(int64_t{1} * work.batch * s.heads + work.head) * s.queries + query] =
                    nothing ? -INFINITY : (highest.at(thread, half) * s.scale + hw.log2(sum)) * kLog2;
            }
        }
    });
}

// One work of a consumer. The ring goes on from work to work.
template <int D, typename Hardware>
FASTVID_ANY void attend(Hardware& hw, const Attention& s, const Walk& walk, int group, Ring<stages(D)>& ring,
                        typename Hardware::Output& output, typename Hardware::Rows& highest,
                        typename Hardware::Rows& total) {
    typename Hardware::Scores scores;
    typename Hardware::Weights weights;
    typename Hardware::Rows shrink;
    hw.wait(barrier_of(kKeyFull, ring.stage), ring.parity);
    hw.turn(group);
    score<D>(hw, scores, group, ring.stage);
    hw.pass(group);
    hw.template drain<0>(scores);
    hw.arrive(barrier_of(kKeyEmpty, ring.stage));
    if (walk.steps == 1) hw.arrive(barrier_of(kQueryEmpty));
    softmax(hw, scores, highest, total, shrink, key_count(s, walk, 0), s.scale);
    round_weights(hw, scores, weights);
    for (int step = 1; step < walk.steps; ++step) {
        const Ring<stages(D)> next = ring.next();
        hw.wait(barrier_of(kValueFull, ring.stage), ring.parity);
        hw.wait(barrier_of(kKeyFull, next.stage), next.parity);
        hw.turn(group);
        score<D>(hw, scores, group, next.stage);
        weigh<D>(hw, output, weights, ring.stage);
        hw.pass(group);
        hw.template drain<1>(scores);
        hw.arrive(barrier_of(kKeyEmpty, next.stage));
        if (step + 1 == walk.steps) hw.arrive(barrier_of(kQueryEmpty));
        softmax(hw, scores, highest, total, shrink, key_count(s, walk, step), s.scale);
        hw.template drain<0>(output);
        hw.arrive(barrier_of(kValueEmpty, ring.stage));
        shrink_output<D>(hw, output, shrink);
        round_weights(hw, scores, weights);
        ring = next;
    }
    hw.wait(barrier_of(kValueFull, ring.stage), ring.parity);
    weigh<D>(hw, output, weights, ring.stage);
    hw.template drain<0>(output);
    hw.arrive(barrier_of(kValueEmpty, ring.stage));
    ring = ring.next();
}

// A consumer's loop over the works of a block. The first group begins; at the end it takes the turn that is left.
template <int D, typename Hardware>
FASTVID_ANY void consume(Hardware& hw, const Attention& s, int group, int64_t number, int64_t every, uint16_t* out,
                         float* lse) {
    Ring<stages(D)> ring;
    uint32_t parity = 0;
    if (group == 1) hw.pass(group);
    for (const int64_t end = works(s); number < end; number += every) {
        const Work work = work_of(s, number);
        const Walk walk = walk_of(s, work);
        if (work.first >= work.end) continue;
        typename Hardware::Output output;
        typename Hardware::Rows highest, total;
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int i = 0; i < D / 2; ++i) output.at(thread, i) = 0;
            FASTVID_UNROLL
            for (int half = 0; half < 2; ++half) {
                highest.at(thread, half) = -INFINITY;
                total.at(thread, half) = 0;
            }
        });
        if (walk.steps > 0) {
            hw.wait(barrier_of(kQueryFull), parity);
            parity ^= 1;
            attend<D>(hw, s, walk, group, ring, output, highest, total);
        }
        store<D>(hw, s, work, group, walk.steps == 0, output, highest, total, out, lse);
    }
    if (group == 0) hw.turn(group);
}

}  // namespace fastvid::attention
