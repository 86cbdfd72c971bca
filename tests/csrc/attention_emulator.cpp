// Attention's kernel on the CPU: attention_kernel.h over the hardware of emulated.h. The producer and both consumer
// warpgroups are threads, so that a ring which hands out a stage too early or never is seen, and a turn that nobody
// passes on.
#include <algorithm>
#include <cmath>

#include "attention_call.h"
#include "attention_kernel.h"
#include "warpgroup.h"

using namespace fastvid::attention;
using emulated::Stopped;

namespace {

// What a block's warpgroups share.
struct Block : emulated::Block {
    Block(const Map& q, const Map& k, const Map& v, int head_dim, bool bf16, uint32_t base)
        : emulated::Block(base, barriers_at(head_dim), bf16, expected(head_dim)),
          maps{q, k, v},
          turns{{kGroups}, {kGroups}} {}
    void check_rest() {
        emulated::Block::check_rest();
        for (auto& turn : turns) {
            if (!turn.at_rest()) throw Stopped("a turn is left over");
        }
    }

    Map maps[3];
    emulated::Meeting turns[kGroups];

  private:
    static std::vector<int> expected(int head_dim) {
        std::vector<int> made(barriers(head_dim));
        for (size_t i = 0; i < made.size(); ++i) made[i] = arrivals(static_cast<int>(i));
        return made;
    }
};

// A warpgroup's view of it.
template <int D>
class Emulated : public emulated::Warpgroup {
  public:
    using Scores = emulated::Registers<float, kKeys / 2>;
    using Output = emulated::Registers<float, D / 2>;
    using Weights = emulated::Registers<uint32_t, kKeys / 4>;
    using Rows = emulated::Registers<float, 2>;

    explicit Emulated(Block& block) : Warpgroup(block), block_(block) {}

    uint32_t address(int at) const { return memory().address(at); }
    void arrive(int i) { hand_back(i); }
    void load(Tensor tensor, int at, int i, int column, int row, int head, int batch) {
        load_box(block_.maps[tensor], address(at), i, {column, row, head, batch});
    }
    void turn(int group) { block_.turns[group].meet(); }
    void pass(int group) { block_.turns[group ^ 1].arrive(); }

    void quad_max(Rows& rows) {
        quads(rows, [](float a, float b) { return std::fmax(a, b); });
    }
    void quad_sum(Rows& rows) {
        quads(rows, [](float a, float b) { return a + b; });
    }

    template <bool Add>
    void scores(Scores& to, uint64_t queries, uint64_t keys) {
        later({queries, keys}, {&to}, [this, &to, queries, keys] { make_scores(to, queries, keys, Add); });
    }
    void values(Output& to, Weights& weights, int step, uint64_t values) {
        later({values}, {&to, &weights},
              [this, &to, &weights, step, values] { make_output(to, weights, step, values); });
    }
    template <int Pending, typename Any>
    void drain(Any&) {
        finish(Pending);
    }

    float max(float a, float b) { return std::fmax(a, b); }
    float exp2(float x) { return std::exp2(x); }
    float log2(float x) { return std::log2(x); }
    uint32_t pack(float x, float y) {
        const bool bf16 = memory().bf16();
        return emulated::narrow(x, bf16) | uint32_t{emulated::narrow(y, bf16)} << 16;
    }

  private:
    template <typename Function>
    void quads(Rows& rows, Function function) {
        for (int quad = 0; quad < 128; quad += 4) {
            for (int half = 0; half < 2; ++half) {
                float made = rows.at(quad, half);
                for (int i = 1; i < 4; ++i) made = function(made, rows.at(quad + i, half));
                for (int i = 0; i < 4; ++i) rows.at(quad + i, half) = made;
            }
        }
    }

    // to (+)= left [64, 16] . right [16, columns]
    template <typename To>
    void multiply(To& to, const std::vector<float>& left, const std::vector<float>& right, int columns, bool add) {
        std::vector<float> sum(columns);
        for (int row = 0; row < 64; ++row) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int k = 0; k < 16; ++k) {
                for (int c = 0; c < columns; ++c) sum[c] += left[row * 16 + k] * right[k * columns + c];
            }
            for (int c = 0; c < columns; ++c) {
                const auto [thread, value] = emulated::holder(row, c);
                float& at = to.value[thread][value];
                at = add ? at + sum[c] : sum[c];
            }
        }
    }

    void make_scores(Scores& to, uint64_t a, uint64_t b, bool add) {
        const auto queries = memory().matrix(a, 64), keys = memory().matrix(b, kKeys);
        std::vector<float> across(16 * kKeys);
        for (int i = 0; i < 16 * kKeys; ++i) across[i] = keys[i % kKeys * 16 + i / kKeys];
        multiply(to, queries, across, kKeys, add);
    }

    void make_output(Output& to, const Weights& weights, int step, uint64_t b) {
        std::vector<float> left(64 * 16);
        for (int row = 0; row < 64; ++row) {
            for (int k = 0; k < 16; ++k) {
                const auto [thread, value] = emulated::left_holder(row, k);
                const uint32_t word = weights.value[thread][step * 4 + value];
                left[row * 16 + k] = emulated::widen(static_cast<uint16_t>(word >> k % 2 * 16), memory().bf16());
            }
        }
        multiply(to, left, memory().transposed(b, D), D, true);
    }

    Block& block_;
};

template <int D>
void run(const Call& call, const Attention& s, const void* q, const void* k, const void* v, void* out, float* lse,
         bool bf16, int grid) {
    const Map queries = map_of(call, q, call.queries, call.q_strides);
    const Map keys = map_of(call, k, call.keys, call.k_strides), values = map_of(call, v, call.keys, call.v_strides);
    for (int number = 0; number < grid; ++number) {
        Block block(queries, keys, values, D, bf16, 1024 * (1 + number % 3));
        emulated::beside_each_other(kGroups + 1, [&](int who) {
            const auto hw = std::make_unique<Emulated<D>>(block);
            if (who == kGroups) produce<D>(*hw, s, number, grid);
            if (who < kGroups) consume<D>(*hw, s, who, number, grid, static_cast<uint16_t*>(out), lse);
        });
        block.check_rest();
    }
}

}  // namespace

extern "C" {

// 0, or 1 with the reason in `why`. grid: blocks, as a device of so many multiprocessors has them.
int attention_emulate(const Call* call, const Lists* lists, float scale, const void* q, const void* k, const void* v,
                      void* out, float* lse, int bf16, int grid, char* why, int room) {
    try {
        const std::string reason = refuse(*call, q, k, v, out, scale);
        if (!reason.empty()) throw Stopped(reason);
        const Attention s = attention_of(*call, *lists, scale);
        const int most = static_cast<int>(std::min<int64_t>(works(s), grid));
        call->head_dim == 64 ? run<64>(*call, s, q, k, v, out, lse, bf16, most)
                             : run<128>(*call, s, q, k, v, out, lse, bf16, most);
    } catch (const std::exception& error) {
        emulated::copy(error.what(), why, room);
        return 1;
    }
    return 0;
}

int attention_call_words() {
    return sizeof(Call) / sizeof(int64_t);
}
int attention_stages(int head_dim) {
    return stages(head_dim);
}
int attention_smem(int head_dim) {
    return smem_bytes(head_dim);
}
int attention_barriers_at(int head_dim) {
    return barriers_at(head_dim);
}
int64_t attention_works(const Call* call, const Lists* lists) {
    return works(attention_of(*call, *lists, 1));
}
// (batch, head, first, end) of a work into `to`, then the first key and the number of keys of every step; how many
// steps there are.
int attention_work(const Call* call, const Lists* lists, int64_t number, int* to, int room) {
    const Attention s = attention_of(*call, *lists, 1);
    const Work work = work_of(s, number);
    const Walk walk = walk_of(s, work);
    const int head[4] = {work.batch, work.head, work.first, work.end};
    std::copy(head, head + 4, to);
    for (int step = 0; step < walk.steps && 6 + 2 * step <= room; ++step) {
        to[4 + 2 * step] = first_key(s, walk, step);
        to[5 + 2 * step] = key_count(s, walk, step);
    }
    return walk.steps;
}
uint64_t sm90_descriptor(uint32_t address) {
    return descriptor(address);
}
uint64_t sm90_transposed(uint32_t address, uint32_t panel) {
    return transposed_descriptor(address, panel);
}
uint32_t sm90_swizzled(uint32_t address) {
    return swizzled(address);
}
void sm90_place(int thread, int value, int* to) {
    to[0] = row_of(thread, value / 2 % 2);
    to[1] = column_of(thread, value / 4) + value % 2;
}
}
