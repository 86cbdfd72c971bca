// Attention's form for 8-bit values, as quantize.h makes them: keys and queries are e4m3 or int8, values and weights
// e4m3.
//
//   scores[n, m] = q8[n] . k8[m] * query scale[n] * key scale[block of m]       a block: 128 keys
//   output[n]    = sum_m p[m] 2^exponent[block of m] v8[m] / sum_m p[m]
//
// Powers of two can be taken out of p and into it exactly: weights are p 2^(exponent - unit + kUp) when they are
// rounded, v8 is multiplied by nothing, and the output is kept in units of 2^(unit - kUp). The unit is the exponent of
// the step, so that weights of every block are rounded alike, wherever a row looks; but no further below the highest
// one of the walk than floats can hold. Products of weights and values are made anew for each block and added to
// the output in fp32, since the sums within 8-bit products keep some 14 bits only (DeepSeek-V3, arXiv 2412.19437,
// section 3.3.2; two levels as in SageAttention2, arXiv 2411.10958).
//
// The matrix units take four neighbouring keys of a row in a register as left matrix, and leave two neighbouring ones
// of each of two eights there as result. So the keys of v8 are stored in another order (key_of_slot), and no thread
// has to hand anything to another.
#pragma once

#include "attention_kernel.h"

namespace fastvid::attention {

constexpr int kDepth8 = 32;  // values along K that one wgmma takes
constexpr int kUp = 8;       // weights are at most 2^kUp: e4m3 has numbers from 2^-9 to 448
// How far the unit may be below the highest exponent: sums of 2^34 units, 2^80 of them larger, are floats.
constexpr float kBelow = 80;

// Which of a block's 128 keys lies at a place of a row of v8.
FASTVID_ANY constexpr int key_of_slot(int slot) {
    return slot / 16 * 16 + slot % 4 / 2 * 8 + slot % 16 / 4 * 2 + slot % 2;
}

template <int D>
struct Eight {
    static constexpr int kHeadDim = D, kKeys = attention::kKeys, kBlocks = 1;
    static constexpr bool kCounted = false;  // its consumers leave the producer no registers for it
    FASTVID_ANY static constexpr RegisterSplit registers() { return {24, 240}; }
    FASTVID_ANY static constexpr Room room() { return room_of(kKeys, D, 1); }

    template <typename Hardware>
    struct State {
        typename Hardware::Raw raw;  // products of 8-bit values
        typename Hardware::Scores scores;
        typename Hardware::Weights weights;
        typename Hardware::Output output, part;
        // shrink: what the output is to be multiplied by, to be added to `part`; next: the same, a step later.
        typename Hardware::Rows highest, total, scale, shrink, next;
        float key_scale, up;       // of the step
        float unit, most, rebase;  // of the step, of all so far; from the unit of the step before to this one's
        FASTVID_ANY typename Hardware::Raw& scored() { return raw; }
        FASTVID_ANY typename Hardware::Output& weighed() { return part; }
    };

    template <typename Hardware>
    FASTVID_ANY static void load(Hardware& hw, Tensor tensor, int at, int barrier, int row, const Work& work) {
        hw.expect(barrier, room().tile);
        hw.load(tensor, at, barrier, 0, row, work.head, work.batch);
    }
    FASTVID_ANY static int value_row(int row) { return row / kKeys * D; }

    template <typename Hardware>
    FASTVID_ANY static void start(Hardware& hw, const Attention& s, const Work& work, int group,
                                  State<Hardware>& state) {
        const float* scales = s.scales.queries + head_of(s, work) * s.queries;
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int query = work.first + group * (kQueries / kGroups) + row_of(thread, half);
                state.scale.at(thread, half) = query < work.end ? scales[query] * s.scale : 0;
                state.shrink.at(thread, half) = 0;
            }
        });
        state.unit = state.most = -INFINITY;
    }
    template <typename Hardware>
    FASTVID_ANY static void look(Hardware& hw, const Attention& s, const Work& work, const Walk& walk, int step,
                                 State<Hardware>& state) {
        const int64_t block = head_of(s, work) * s.scales.count + first_key(s, walk, step, kKeys) / kKeys;
        const float exponent = s.scales.blocks[2 * block + 1], before = state.unit;
        state.key_scale = s.scales.blocks[2 * block];
        state.most = hw.max(state.most, exponent);
        state.unit = hw.max(exponent, state.most - kBelow);
        state.up = exponent - state.unit + kUp;
        state.rebase = step == 0 ? 1 : hw.exp2(before - state.unit);
    }

    // raw[64, keys] = the group's queries . keys, without waiting for it.
    template <typename Hardware>
    FASTVID_ANY static void score(Hardware& hw, State<Hardware>& state, int group, int stage) {
        const uint32_t queries = hw.address(group * (kQueries / kGroups) * D);
        const uint32_t keys = hw.address(room().keys_at(stage));
        hw.begin(state.raw);
        FASTVID_UNROLL
        for (int k = 0; k < D / kDepth8; ++k) {
            const uint64_t a = row_descriptor<D>(queries + k * kDepth8), b = row_descriptor<D>(keys + k * kDepth8);
            if (k == 0) {
                hw.template scores<false>(state.raw, a, b);
            } else {
                hw.template scores<true>(state.raw, a, b);
            }
        }
        hw.commit();
    }

    // part[64, D] = weights . values, without waiting for it.
    template <typename Hardware>
    FASTVID_ANY static void weigh(Hardware& hw, State<Hardware>& state, int stage) {
        const uint32_t values = hw.address(room().values_at(stage));
        hw.begin(state.part);
        hw.begin(state.weights);
        FASTVID_UNROLL
        for (int k = 0; k < kKeys / kDepth8; ++k) {
            const uint64_t b = row_descriptor<kKeys>(values + k * kDepth8);
            if (k == 0) {
                hw.template values<false>(state.part, state.weights, k, b);
            } else {
                hw.template values<true>(state.part, state.weights, k, b);
            }
        }
        hw.commit();
    }

    // Scores become powers of two below the row's highest score so far, times 2^up. The highest one counts log2(e)
    // and all scales.
    template <typename Hardware>
    FASTVID_ANY static void softmax(Hardware& hw, const Attention&, int count, State<Hardware>& state) {
        auto& found = state.next;
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int i = 0; i < kKeys / 2; ++i) state.scores.at(thread, i) = hw.widen(state.raw.at(thread, i));
        });
        mask<kKeys>(hw, state.scores, count);
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int half = 0; half < 2; ++half) {
                found.at(thread, half) = highest_score<kKeys>(hw, state.scores, thread, half);
            }
        });
        hw.quad_max(found);
        const float up = state.up, down = hw.exp2(-up), key_scale = state.key_scale;
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float scale = state.scale.at(thread, half) * key_scale;
                const float most = hw.max(state.highest.at(thread, half), found.at(thread, half) * scale);
                const float shrink = hw.exp2(state.highest.at(thread, half) - most), base = most - up;
                state.highest.at(thread, half) = most;
                float sum = 0;
                FASTVID_UNROLL
                for (int i = half * 2; i < kKeys / 2; i += 4) {
                    FASTVID_UNROLL
                    for (int j = i; j < i + 2; ++j) {
                        state.scores.at(thread, j) = hw.exp2(state.scores.at(thread, j) * scale - base);
                        sum += state.scores.at(thread, j);
                    }
                }
                state.total.at(thread, half) = state.total.at(thread, half) * shrink + sum * down;
                state.next.at(thread, half) = shrink * state.rebase;
            }
        });
    }

    // The left matrix of the next product: a register for two keys of one eight and two of the next.
    template <typename Hardware>
    FASTVID_ANY static void round(Hardware& hw, State<Hardware>& state) {
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int i = 0; i < kKeys / 8; ++i) {
                const int at = i / 4 * 16 + i % 4 / 2 * 8 + i % 2 * 2;
                state.weights.at(thread, i) =
                    hw.pack8(state.scores.at(thread, at), state.scores.at(thread, at + 1),
                             state.scores.at(thread, at + 4), state.scores.at(thread, at + 5));
            }
        });
    }

    template <typename Hardware>
    FASTVID_ANY static void settle(Hardware& hw, State<Hardware>& state) {
        end(hw, state);
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int half = 0; half < 2; ++half) state.shrink.at(thread, half) = state.next.at(thread, half);
        });
    }
    template <typename Hardware>
    FASTVID_ANY static void end(Hardware& hw, State<Hardware>& state) {
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int i = 0; i < D / 2; ++i) {
                state.output.at(thread, i) =
                    state.output.at(thread, i) * state.shrink.at(thread, i / 2 % 2) + state.part.at(thread, i);
            }
        });
    }

    FASTVID_ANY static float exponent(const Attention& s, int64_t query, float highest) {
        return s.scales.shifts ? highest + s.scales.shifts[query] * s.scale : highest;
    }
    template <typename Hardware>
    FASTVID_ANY static float value_scale(Hardware& hw, const State<Hardware>& state) {
        return hw.exp2(state.unit - kUp);
    }

  private:
    FASTVID_ANY static int64_t head_of(const Attention& s, const Work& work) {
        return int64_t{1} * work.batch * s.heads + work.head;
    }
};

}  // namespace fastvid::attention
