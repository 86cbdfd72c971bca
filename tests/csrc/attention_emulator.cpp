// Attention's kernel on the CPU: attention_kernel.h over the hardware of emulated.h. The producer and both consumer
// warpgroups are threads, so that a ring which hands out a stage too early or never is seen, and a turn that nobody
// passes on.
#include <algorithm>
#include <cmath>

#include "attention_call.h"
#include "attention_eight_call.h"
#include "attention_half.h"
#include "warpgroup.h"

using namespace fastvid::attention;
using emulated::Stopped;

namespace {

// What a block's warpgroups share.
struct Block : emulated::Block {
    Block(const Map (&told)[3], const Room& room, bool bf16, uint32_t base, int blocks)
        : emulated::Block(base, room.barriers_at(), bf16, expected(room, blocks)),
          maps{told[0], told[1], told[2]},
          turns{{kGroups}, {kGroups}} {}
    void check_rest() {
        emulated::Block::check_rest();
        for (auto& turn : turns) {
            if (!turn.at_rest()) throw Stopped("a turn is left over");
        }
    }

    std::vector<Block*> cluster = {this};
    int rank = 0;
    Map maps[3];
    int number = -1;
    emulated::Meeting turns[kGroups];

  private:
    static std::vector<int> expected(const Room& room, int blocks) {
        std::vector<int> made(barriers(room));
        for (size_t i = 0; i < made.size(); ++i) made[i] = arrivals(static_cast<int>(i), blocks);
        return made;
    }
};

// A warpgroup's view of it, whatever the values are.
class Warpgroup : public emulated::Warpgroup {
  public:
    using Rows = emulated::Registers<float, 2>;

    explicit Warpgroup(Block& block) : emulated::Warpgroup(block), block_(block) {}

    uint32_t address(int at) const { return memory().address(at); }
    void arrive(int i) { hand_back(i); }
    void release(int i) {
        hand_back(i);
        for (Block* other : block_.cluster) {
            for (int warp = 0; warp < 4 && other != &block_; ++warp) other->made[i]->arrive();
        }
    }
    int rank() const { return block_.rank; }
    void share(Tensor tensor, int at, int i, int column, int row, int head, int batch) {
        for (Block* one : block_.cluster) {
            load_into(*one, block_.maps[tensor], address(at), i, {column, row, head, batch});
        }
    }
    void load(Tensor tensor, int at, int i, int column, int row, int head, int batch) {
        load_box(block_.maps[tensor], address(at), i, {column, row, head, batch});
    }
    void tell(int i, int number) {
        pass_on(i);
        block_.number = number;
        block_.made[i]->arrive();
    }
    int told() const { return block_.number; }
    int next(int32_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }
    void turn(int group) { block_.turns[group].meet(); }
    void pass(int group) { block_.turns[group ^ 1].arrive(); }

    void quad_max(Rows& rows) {
        quads(rows, [](float a, float b) { return std::fmax(a, b); });
    }
    void quad_sum(Rows& rows) {
        quads(rows, [](float a, float b) { return a + b; });
    }

    template <int Pending, typename Any>
    void drain(Any&) {
        finish(Pending);
    }

    float max(float a, float b) { return std::fmax(a, b); }
    float exp2(float x) { return std::exp2(x); }
    float log2(float x) { return std::log2(x); }
    float inverse(float x) { return 1 / x; }
    uint32_t pack(float x, float y) {
        const bool bf16 = memory().bf16();
        return emulated::narrow(x, bf16) | uint32_t{emulated::narrow(y, bf16)} << 16;
    }

  protected:
    // to (+)= left [64, depth] . right [columns, depth]
    template <typename To, typename T>
    static void multiply(To& to, const std::vector<T>& left, const std::vector<T>& right, int columns, bool add) {
        const int depth = static_cast<int>(left.size()) / 64;
        std::vector<T> across(right.size()), sum(columns);
        for (int k = 0; k < depth; ++k) {
            for (int c = 0; c < columns; ++c) across[k * columns + c] = right[c * depth + k];
        }
        for (int row = 0; row < 64; ++row) {
            std::fill(sum.begin(), sum.end(), T{0});
            for (int k = 0; k < depth; ++k) {
                for (int c = 0; c < columns; ++c) sum[c] += left[row * depth + k] * across[k * columns + c];
            }
            for (int c = 0; c < columns; ++c) {
                const auto [thread, value] = emulated::holder(row, c);
                T& at = to.value[thread][value];
                at = add ? at + sum[c] : sum[c];
            }
        }
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

    Block& block_;
};

template <int D, int Keys>
class Halves : public Warpgroup {
  public:
    using Warpgroup::Warpgroup;
    using Scores = emulated::Registers<float, Keys / 2>;
    using Output = emulated::Registers<float, D / 2>;
    using Weights = emulated::Registers<uint32_t, Keys / 4>;

    template <bool Add>
    void scores(Scores& to, uint64_t queries, uint64_t keys) {
        later({queries, keys}, {&to}, [this, &to, queries, keys] {
            multiply(to, memory().matrix(queries, 64), memory().matrix(keys, Keys), Keys, Add);
        });
    }
    template <bool Add>
    void values(Output& to, Weights& weights, int step, uint64_t values) {
        later({values}, {&to, &weights}, [this, &to, &weights, step, values] {
            std::vector<float> left(64 * 16), right(D * 16);
            for (int row = 0; row < 64; ++row) {
                for (int k = 0; k < 16; ++k) {
                    const auto [thread, value] = emulated::left_holder(row, k);
                    const uint32_t word = weights.value[thread][step * 4 + value];
                    left[row * 16 + k] = emulated::widen(static_cast<uint16_t>(word >> k % 2 * 16), memory().bf16());
                }
            }
            const auto across = memory().transposed(values, D);
            for (int i = 0; i < 16 * D; ++i) right[i % D * 16 + i / D] = across[i];
            multiply(to, left, right, D, Add);
        });
    }
};

template <int D, bool Int8>
class Bytes : public Warpgroup {
    using Product = std::conditional_t<Int8, int32_t, float>;

  public:
    using Warpgroup::Warpgroup;
    using Raw = emulated::Registers<Product, kKeys / 2>;
    using Scores = emulated::Registers<float, kKeys / 2>;
    using Output = emulated::Registers<float, D / 2>;
    using Weights = emulated::Registers<uint32_t, kKeys / 8>;

    template <bool Add>
    void scores(Raw& to, uint64_t queries, uint64_t keys) {
        later({queries, keys}, {&to}, [this, &to, queries, keys] {
            multiply(to, wide<Product, Int8>(memory().bytes_of(queries, 64)),
                     wide<Product, Int8>(memory().bytes_of(keys, kKeys)), kKeys, Add);
        });
    }
    template <bool Add>
    void values(Output& to, Weights& weights, int step, uint64_t values) {
        later({values}, {&to, &weights}, [this, &to, &weights, step, values] {
            std::vector<uint8_t> left(64 * 32);
            for (int row = 0; row < 64; ++row) {
                for (int k = 0; k < 32; ++k) {
                    const auto [thread, value] = emulated::left_holder8(row, k);
                    left[row * 32 + k] = static_cast<uint8_t>(weights.value[thread][step * 4 + value] >> k % 4 * 8);
                }
            }
            multiply(to, wide<float, false>(left), wide<float, false>(memory().bytes_of(values, D)), D, Add);
        });
    }
    float widen(Product x) { return static_cast<float>(x); }
    uint32_t pack8(float a, float b, float c, float d) { return emulated::pack8<false>(a, b, c, d); }

  private:
    template <typename T, bool Signed>
    static std::vector<T> wide(const std::vector<uint8_t>& bytes) {
        std::vector<T> made(bytes.size());
        for (size_t i = 0; i < bytes.size(); ++i) {
            made[i] = Signed ? static_cast<T>(static_cast<int8_t>(bytes[i])) : T(emulated::widen_e4m3(bytes[i]));
        }
        return made;
    }
};

template <typename Form, typename Hardware>
void run(const Attention& s, const Map (&maps)[3], void* out, float* lse, bool bf16, int grid) {
    constexpr int kBlocks = Form::kBlocks;
    const int most = static_cast<int>(std::min<int64_t>(works(s), std::max(grid / kBlocks * kBlocks, kBlocks)));
    const auto cluster_of = [&](int first) {
        std::vector<std::unique_ptr<Block>> blocks;
        std::vector<Block*> cluster;
        for (int rank = 0; rank < kBlocks; ++rank) {
            blocks.push_back(
                std::make_unique<Block>(maps, Form::room(), bf16, 1024 * (1 + first / kBlocks % 3), kBlocks));
            cluster.push_back(blocks.back().get());
            blocks.back()->rank = rank;
        }
        for (auto& block : blocks) block->cluster = cluster;
        emulated::beside_each_other(kBlocks * (kGroups + 1), [&](int thread) {
            const int rank = thread / (kGroups + 1), who = thread % (kGroups + 1);
            const auto hw = std::make_unique<Hardware>(*blocks[rank]);
            if (who == kGroups) produce<Form>(*hw, s, first + rank, most);
            if (who < kGroups) consume<Form>(*hw, s, who, first + rank, most, static_cast<uint16_t*>(out), lse);
        });
        for (auto& block : blocks) block->check_rest();
    };
    // Blocks that share a counter run at the same time, if they are few.
    if (Form::kCounted && s.given && most <= 4) return emulated::beside_each_other(most, cluster_of);
    for (int first = 0; first < most; first += kBlocks) cluster_of(first);
}

template <int D, int Keys, int Blocks = 1>
void run_half(const Call& call, const Attention& s, const void* const* tensors, void* out, float* lse, bool bf16,
              int grid) {
    const Map maps[3] = {map_of(call, tensors[0], call.queries, call.q_strides, kQueries),
                         map_of(call, tensors[1], call.keys, call.k_strides, Keys / Blocks),
                         map_of(call, tensors[2], call.keys, call.v_strides, Keys / Blocks)};
    run<Half<D, Keys, Blocks>, Halves<D, Keys>>(s, maps, out, lse, bf16, grid);
}

template <int D>
void run_eight(const Attention& s, const Map (&maps)[3], bool int8, void* out, float* lse, bool bf16, int grid) {
    int8 ? run<Eight<D>, Bytes<D, true>>(s, maps, out, lse, bf16, grid)
         : run<Eight<D>, Bytes<D, false>>(s, maps, out, lse, bf16, grid);
}

// What quantize.cu has of a device. The lanes of a token are asked one after the other, so their maximum and sum are
// made before: as the lanes of a warp make them, in halves.
struct Lanes {
    bool bf16;
    const float* highest = nullptr;
    const float* product = nullptr;
    void unpack(uint32_t word, float& x, float& y) const {
        x = emulated::widen(static_cast<uint16_t>(word), bf16);
        y = emulated::widen(static_cast<uint16_t>(word >> 16), bf16);
    }
    uint32_t pack(float x, float y) const {
        return emulated::narrow(x, bf16) | uint32_t{emulated::narrow(y, bf16)} << 16;
    }
    template <bool Int8>
    uint32_t pack8(float a, float b, float c, float d) const {
        return emulated::pack8<Int8>(a, b, c, d);
    }
    float lane_max(float, int) const { return *highest; }
    float lane_sum(float, int) const { return *product; }
};

namespace q8 = fastvid::quantize;

template <int D, bool Int8>
void quantize_queries(const q8::Call& s, const uint16_t* x, const float* mean, uint8_t* out, float* scale, float* shift,
                      bool bf16) {
    for (int64_t index = 0; index < s.batch * s.heads * q8::blocks(s); ++index) {
        const q8::Block block = q8::block_of(s, index);
        for (int pass = 0; pass < q8::passes<D>(); ++pass) {
            for (int first = 0; first < q8::kThreads; first += q8::lanes(s)) {
                float highest = 0, product = 0;
                Lanes hw = {bf16, &highest, &product};
                for (int thread = first; thread < first + q8::lanes(s); ++thread) {
                    const int token = q8::token_of(s, thread, pass), column = q8::column_of(s, thread);
                    const q8::Values values = q8::load(hw, s, block, x, nullptr, token, column);
                    highest = q8::larger(q8::most(values), highest);
                    for (int i = 0; mean && i < q8::kVector; ++i) {
                        product += values.at[i] * mean[block.head * D + column + i];
                    }
                }
                for (int thread = first; thread < first + q8::lanes(s); ++thread) {
                    q8::run_queries<Int8>(hw, s, index, thread, pass, x, mean, out, scale, shift);
                }
            }
        }
    }
}

template <int D, bool Int8>
void quantize_keys(const q8::Call& s, const uint16_t* x, const float* mean, uint8_t* out, float* scales, bool bf16) {
    const Lanes hw = {bf16};
    std::vector<q8::Values> values(q8::passes<D>() * q8::kThreads);
    for (int64_t index = 0; index < s.batch * s.heads * q8::blocks(s); ++index) {
        float highest = 0;
        for (int i = 0; i < static_cast<int>(values.size()); ++i) {
            const int thread = i % q8::kThreads, pass = i / q8::kThreads;
            values[i] = q8::load(hw, s, q8::block_of(s, index), x, mean, q8::token_of(s, thread, pass),
                                 q8::column_of(s, thread));
            highest = q8::larger(q8::most(values[i]), highest);
        }
        for (int i = 0; i < static_cast<int>(values.size()); ++i) {
            q8::store_keys<Int8>(hw, s, index, i % q8::kThreads, i / q8::kThreads, values[i], highest, out, scales);
        }
    }
}

template <int D>
void quantize_values(const q8::Call& s, const uint16_t* x, uint8_t* out, float* scales, bool bf16) {
    const Lanes hw = {bf16};
    for (int64_t index = 0; index < s.batch * s.heads * q8::blocks(s); ++index) {
        std::vector<uint16_t> kept(kKeys * q8::padded(D), 0x7F7F);
        float highest = 0;
        for (int i = 0; i < q8::passes<D>() * q8::kThreads; ++i) {
            const int thread = i % q8::kThreads, pass = i / q8::kThreads;
            const q8::Values values = q8::load(hw, s, q8::block_of(s, index), x, nullptr, q8::token_of(s, thread, pass),
                                               q8::column_of(s, thread));
            highest = q8::larger(q8::most(values), highest);
            q8::keep_values(s, thread, pass, hw, values, kept.data());
        }
        for (int thread = 0; thread < q8::kThreads; ++thread) {
            q8::store_values(hw, s, index, thread, highest, kept.data(), out, scales);
        }
    }
}

template <int D>
void quantize(int part, const q8::Call& s, bool int8, const uint16_t* x, const float* mean, uint8_t* out, float* scales,
              float* shift, bool bf16) {
    if (part == 0) {
        (int8 ? quantize_queries<D, true> : quantize_queries<D, false>)(s, x, mean, out, scales, shift, bf16);
    }
    if (part == 1) (int8 ? quantize_keys<D, true> : quantize_keys<D, false>)(s, x, mean, out, scales, bf16);
    if (part == 2) quantize_values<D>(s, x, out, scales, bf16);
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
        const void* tensors[3] = {q, k, v};
        const auto run_it = paired(*call)                      ? run_half<128, kWideKeys, kPair>
                            : keys_of_step(*call) == kWideKeys ? run_half<128, kWideKeys>
                            : call->head_dim == 128            ? run_half<128, kKeys>
                                                               : run_half<64, kKeys>;
        run_it(*call, s, tensors, out, lse, bf16, grid);
    } catch (const std::exception& error) {
        emulated::copy(error.what(), why, room);
        return 1;
    }
    return 0;
}

// The same of 8-bit values. tensors: q, k, v; scales: of queries, shifts or null, of blocks.
int attention_eight_emulate(const Call* call, const Lists* lists, float scale, const void* const* tensors,
                            const float* const* scales, int blocks, int int8, void* out, float* lse, int bf16, int grid,
                            char* why, int room) {
    try {
        const Eights at = {tensors[0], tensors[1], tensors[2], {scales[0], scales[1], scales[2], blocks}};
        const std::string reason = refuse_eight(*call, at.scales, out, scale);
        if (!reason.empty()) throw Stopped(reason);
        const Attention s = attention_of(*call, *lists, at.scales, scale);
        const Map maps[3] = {map_of_queries(*call, at), map_of_keys(*call, at), map_of_values(*call, at)};
        call->head_dim == 64 ? run_eight<64>(s, maps, int8, out, lse, bf16, grid)
                             : run_eight<128>(s, maps, int8, out, lse, bf16, grid);
    } catch (const std::exception& error) {
        emulated::copy(error.what(), why, room);
        return 1;
    }
    return 0;
}

// part: 0 queries, 1 keys, 2 values.
int quantize_emulate(int part, const q8::Call* call, int int8, const uint16_t* x, const float* mean, uint8_t* out,
                     float* scales, float* shift, int bf16, char* why, int room) {
    const std::string reason = q8::refuse(*call, x);
    if (reason.empty()) {
        (call->head_dim == 64 ? quantize<64> : quantize<128>)(part, *call, int8, x, mean, out, scales, shift, bf16);
        return 0;
    }
    emulated::copy(reason, why, room);
    return 1;
}

int key_of_slot8(int slot) {
    return key_of_slot(slot);
}
uint8_t narrow_e4m3(float value) {
    return emulated::narrow_e4m3(value);
}
float widen_e4m3(uint8_t bits) {
    return emulated::widen_e4m3(bits);
}
int attention_call_words() {
    return sizeof(Call) / sizeof(int64_t);
}
int attention_stages(int keys, int head_dim, int value_bytes) {
    return room_of(keys, head_dim, value_bytes).stages();
}
int attention_smem(int keys, int head_dim, int value_bytes) {
    return room_of(keys, head_dim, value_bytes).bytes();
}
int attention_barriers_at(int keys, int head_dim, int value_bytes) {
    return room_of(keys, head_dim, value_bytes).barriers_at();
}
int attention_paired(const Call* call) {
    return paired(*call);
}
int attention_keys_of_step(const Call* call) {
    return keys_of_step(*call);
}
int64_t attention_works(const Call* call, const Lists* lists) {
    return works(attention_of(*call, *lists, 1));
}
// (batch, head, first, end) of a work into `to`, then the first key and the number of keys of every step; how many
// steps there are.
int attention_work(const Call* call, const Lists* lists, int64_t number, int* to, int room) {
    const Attention s = attention_of(*call, *lists, 1);
    const Work work = work_of(s, static_cast<int>(number));
    const int keys = keys_of_step(*call);
    const Walk walk = walk_of(s, work, keys);
    const int head[4] = {work.batch, work.head, work.first, work.end};
    std::copy(head, head + 4, to);
    for (int step = 0; step < walk.steps && 6 + 2 * step <= room; ++step) {
        to[4 + 2 * step] = first_key(s, walk, step, keys);
        to[5 + 2 * step] = key_count(s, walk, step, keys);
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
