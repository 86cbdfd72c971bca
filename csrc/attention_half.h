// Attention's form for bf16 and fp16: rows of 64 columns (128 bytes, swizzled), side by side in panels; values lie as
// they come, keys along K, and are read transposed.
#pragma once

#include "attention_kernel.h"

namespace fastvid::attention {

template <int D, int Keys = kKeys, int Blocks = 1>
struct Half {
    static constexpr int kHeadDim = D, kKeys = Keys, kBlocks = Blocks;
    static constexpr int kPanel = Keys * kRow, kQueryPanel = kQueries * kRow;  // bytes of their rows of 64 columns
    static_assert(kPanel / Blocks % 1024 == 0, "the swizzle counts from where a block's part begins");
    static constexpr bool kCounted = Keys == attention::kKeys;
    FASTVID_ANY static constexpr RegisterSplit registers() {
        return kCounted || Blocks > 1 ? RegisterSplit{40, 232} : RegisterSplit{24, 240};
    }
    static_assert(kPanel % 1024 == 0, "the swizzle counts from where a panel begins");
    FASTVID_ANY static constexpr Room room() { return room_of(Keys, D, kBytes); }

    template <typename Hardware>
    struct State {
        typename Hardware::Scores scores;
        typename Hardware::Weights weights;
        typename Hardware::Output output;
        typename Hardware::Rows highest, total, shrink;
        FASTVID_ANY typename Hardware::Scores& scored() { return scores; }
        FASTVID_ANY typename Hardware::Output& weighed() { return output; }
    };

    template <typename Hardware>
    FASTVID_ANY static void load(Hardware& hw, Tensor tensor, int at, int barrier, int row, const Work& work) {
        const int bytes = tensor == kQuery ? kQueryPanel : kPanel;
        hw.expect(barrier, D / kColumns * bytes);
        FASTVID_UNROLL
        for (int panel = 0; panel < D / kColumns; ++panel) {
            const int to = at + panel * bytes, column = panel * kColumns;
            if (Blocks == 1 || tensor == kQuery) {
                hw.load(tensor, to, barrier, column, row, work.head, work.batch);
            } else {
                const int first = hw.rank() * (Keys / Blocks);
                hw.share(tensor, to + first * kRow, barrier, column, row + first, work.head, work.batch);
            }
        }
    }
    FASTVID_ANY static int value_row(int row) { return row; }

    template <typename Hardware>
    FASTVID_ANY static void start(Hardware&, const Attention&, const Work&, int, State<Hardware>&) {}
    template <typename Hardware>
    FASTVID_ANY static void look(Hardware&, const Attention&, const Work&, const Walk&, int, State<Hardware>&) {}

    // scores[64, keys] = the group's queries . keys, without waiting for it.
    template <typename Hardware>
    FASTVID_ANY static void score(Hardware& hw, State<Hardware>& state, int group, int stage) {
        const uint32_t queries = hw.address(group * (kQueries / kGroups) * kRow);
        const uint32_t keys = hw.address(room().keys_at(stage));
        hw.begin(state.scores);
        FASTVID_UNROLL
        for (int k = 0; k < D / kDepth; ++k) {
            const int panel = k * kDepth / kColumns;
            const uint32_t at = k * kDepth % kColumns * kBytes;
            const uint64_t a = descriptor(queries + panel * kQueryPanel + at);
            const uint64_t b = descriptor(keys + panel * kPanel + at);
            if (k == 0) {
                hw.template scores<false>(state.scores, a, b);
            } else {
                hw.template scores<true>(state.scores, a, b);
            }
        }
        hw.commit();
    }

    // output[64, D] += weights . values, without waiting for it.
    template <typename Hardware>
    FASTVID_ANY static void weigh(Hardware& hw, State<Hardware>& state, int stage) {
        const uint32_t values = hw.address(room().values_at(stage));
        hw.begin(state.output);
        hw.begin(state.weights);
        FASTVID_UNROLL
        for (int k = 0; k < Keys / kDepth; ++k) {
            hw.template values<true>(state.output, state.weights, k,
                                     transposed_descriptor(values + k * kDepth * kRow, kPanel));
        }
        hw.commit();
    }

    // Scores become powers of two below the row's highest score so far; `shrink` is what makes older sums smaller by.
    template <typename Hardware>
    FASTVID_ANY static void softmax(Hardware& hw, const Attention& s, int count, State<Hardware>& state) {
        typename Hardware::Rows found;
        mask<Keys>(hw, state.scores, count);
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float most = highest_score<Keys>(hw, state.scores, thread, half);
                found.at(thread, half) = hw.max(state.highest.at(thread, half), most);
            }
        });
        hw.quad_max(found);
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float most = found.at(thread, half), base = most * s.scale;
                state.shrink.at(thread, half) = hw.exp2(state.highest.at(thread, half) * s.scale - base);
                state.highest.at(thread, half) = most;
                float sum = 0;
                FASTVID_UNROLL
                for (int i = half * 2; i < Keys / 2; i += 4) {
                    FASTVID_UNROLL
                    for (int j = i; j < i + 2; ++j) {
                        state.scores.at(thread, j) = hw.exp2(state.scores.at(thread, j) * s.scale - base);
                        sum += state.scores.at(thread, j);
                    }
                }
                state.total.at(thread, half) = state.total.at(thread, half) * state.shrink.at(thread, half) + sum;
            }
        });
    }

    // The left matrix of the next product: a register for two neighbouring keys of a row.
    template <typename Hardware>
    FASTVID_ANY static void round(Hardware& hw, State<Hardware>& state) {
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int i = 0; i < Keys / 4; ++i) {
                state.weights.at(thread, i) =
                    hw.pack(state.scores.at(thread, 2 * i), state.scores.at(thread, 2 * i + 1));
            }
        });
    }

    template <typename Hardware>
    FASTVID_ANY static void settle(Hardware& hw, State<Hardware>& state) {
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int i = 0; i < D / 2; ++i) state.output.at(thread, i) *= state.shrink.at(thread, i / 2 % 2);
        });
    }
    template <typename Hardware>
    FASTVID_ANY static void end(Hardware&, State<Hardware>&) {}

    FASTVID_ANY static float exponent(const Attention& s, int64_t, float highest) { return highest * s.scale; }
    template <typename Hardware>
    FASTVID_ANY static float value_scale(Hardware&, const State<Hardware>&) {
        return 1;
    }
};

}  // namespace fastvid::attention
