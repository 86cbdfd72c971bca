// Attention's kernel on the CPU: attention_kernel.h over the hardware of emulated.h. The producer and both consumer
// warpgroups are threads, so that a ring which hands out a stage too early or never is seen, and a turn that nobody
// passes on.
#include <algorithm>
#include <cmath>

#include "attention_call.h"
#include "attention_kernel.h"
#include "emulated.h"

using namespace fastvid::attention;
using emulated::Stopped;

namespace {

// What a block's warpgroups share.
struct Block {
    Block(const Map& q, const Map& k, const Map& v, int head_dim, bool bf16, uint32_t base)
        : maps{q, k, v}, memory(base, barriers_at(head_dim), bf16), turns{{kGroups}, {kGroups}} {
        for (int i = 0; i < barriers(head_dim); ++i) made.emplace_back(new emulated::Barrier(arrivals(i)));
    }
    void check_rest() {
        for (auto& barrier : made) {
            if (!barrier->at_rest()) throw Stopped("a barrier is left in the middle of a phase");
        }
        for (auto& turn : turns) {
            if (!turn.at_rest()) throw Stopped("a turn is left over");
        }
    }

    Map maps[3];
    emulated::Memory memory;
    std::vector<std::unique_ptr<emulated::Barrier>> made;
    emulated::Meeting turns[kGroups];
};

// A warpgroup's view of it: registers are those of 128 threads. Products are made as late as wgmma may make them: when
// they are waited for, from what memory and registers hold then. What is changed too early shows.
template <int D>
class Emulated {
  public:
    template <typename T, int Count>
    struct Registers {
        T value[128][Count];
        T& at(int thread, int i) { return value[thread][i]; }
        Registers() { std::memset(value, 0xFF, sizeof value); }  // NaN
    };
    using Scores = Registers<float, kKeys / 2>;
    using Output = Registers<float, D / 2>;
    using Weights = Registers<uint32_t, kKeys / 4>;
    using Rows = Registers<float, 2>;

    explicit Emulated(Block& block) : block_(block) {}

    uint32_t address(int at) const { return block_.memory.address(at); }
    void wait(int i, uint32_t parity) { block_.made[i]->wait(parity); }
    void expect(int i, int bytes) { block_.made[i]->arrive(bytes); }
    void arrive(int i) {
        for (int warp = 0; warp < 4; ++warp) block_.made[i]->arrive();
    }
    void load(Tensor tensor, int at, int i, int column, int row, int head, int batch) {
        block_.made[i]->complete(block_.memory.load(block_.maps[tensor], address(at), {column, row, head, batch}));
    }
    void turn(int group) { block_.turns[group].meet(); }
    void pass(int group) { block_.turns[group ^ 1].arrive(); }

    template <typename Function>
    void each(Function function) {
        for (int thread = 0; thread < 128; ++thread) function(thread);
    }
    void quad_max(Rows& rows) {
        quads(rows, [](float a, float b) { return std::fmax(a, b); });
    }
    void quad_sum(Rows& rows) {
        quads(rows, [](float a, float b) { return a + b; });
    }

    template <typename Any>
    void begin(Any&) {}
    template <bool Add>
    void scores(Scores& to, uint64_t queries, uint64_t keys) {
        open_.push_back({&to, nullptr, nullptr, queries, keys, 0, Add});
    }
    void values(Output& to, Weights& weights, int step, uint64_t values) {
        open_.push_back({nullptr, &to, &weights, 0, values, step, true});
    }
    void commit() {
        groups_.push_back(std::move(open_));
        open_.clear();
    }
    template <int Pending, typename Any>
    void drain(Any&) {
        while (groups_.size() > Pending) {
            for (const Product& product : groups_.front()) {
                product.scores ? make_scores(product) : make_output(product);
            }
            groups_.erase(groups_.begin());
        }
    }

    float max(float a, float b) { return std::fmax(a, b); }
    float exp2(float x) { return std::exp2(x); }
    float log2(float x) { return std::log2(x); }
    uint32_t pack(float x, float y) {
        const bool bf16 = block_.memory.bf16();
        return emulated::narrow(x, bf16) | uint32_t{emulated::narrow(y, bf16)} << 16;
    }

  private:
    struct Product {
        Scores* scores;
        Output* output;
        Weights* weights;
        uint64_t a, b;
        int step;
        bool add;
    };

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
                float& at = to.at(thread, value);
                at = add ? at + sum[c] : sum[c];
            }
        }
    }

    void make_scores(const Product& product) {
        const auto queries = block_.memory.matrix(product.a, 64), keys = block_.memory.matrix(product.b, kKeys);
        std::vector<float> across(16 * kKeys);
        for (int i = 0; i < 16 * kKeys; ++i) across[i] = keys[i % kKeys * 16 + i / kKeys];
        multiply(*product.scores, queries, across, kKeys, product.add);
    }

    void make_output(const Product& product) {
        std::vector<float> weights(64 * 16);
        for (int row = 0; row < 64; ++row) {
            for (int k = 0; k < 16; ++k) {
                const auto [thread, value] = emulated::left_holder(row, k);
                const uint32_t word = product.weights->at(thread, product.step * 4 + value);
                weights[row * 16 + k] =
                    emulated::widen(static_cast<uint16_t>(word >> k % 2 * 16), block_.memory.bf16());
            }
        }
        multiply(*product.output, weights, block_.memory.transposed(product.b, D), D, product.add);
    }

    Block& block_;
    std::vector<Product> open_;
    std::vector<std::vector<Product>> groups_;
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
