// Where the kernels' own code and the emulator expect things to be, told without running a kernel: descriptors in the
// order in which products get them, registers as they are packed and stored, memory as a load leaves it.
// test_sm90_layout.py holds all of it against what CuTe says.
#include <algorithm>
#include <cmath>

#include "attention_eight.h"
#include "attention_half.h"
#include "conv_kernel.h"
#include "emulated.h"

namespace {

namespace attention = fastvid::attention;
namespace conv = fastvid::conv;

// Numbers in the place of values: two of 16 bits in a register.
uint32_t pair_of(float x, float y) {
    return static_cast<uint32_t>(x) | static_cast<uint32_t>(y) << 16;
}

template <int D, int Keys = attention::kKeys>
struct Recorder {
    template <typename T, int Count>
    struct Registers {
        T value[128][Count];
        T& at(int thread, int i) { return value[thread][i]; }
    };
    using Scores = Registers<float, Keys / 2>;
    using Output = Registers<float, D / 2>;
    using Weights = Registers<uint32_t, Keys / 4>;
    using Rows = Registers<float, 2>;

    uint32_t address(int at) const { return base + static_cast<uint32_t>(at); }
    template <typename Function>
    void each(Function function) {
        for (int thread = 0; thread < 128; ++thread) function(thread);
    }
    void quad_sum(Rows&) {}
    template <typename Any>
    void begin(Any&) {}
    void commit() {}
    template <bool Add>
    void scores(Scores&, uint64_t queries, uint64_t keys) {
        told.insert(told.end(), {queries, keys, uint64_t{Add}});
    }
    template <bool Add>
    void values(Output&, Weights&, int step, uint64_t values) {
        told.insert(told.end(), {static_cast<uint64_t>(step), values});
    }
    uint32_t pack(float x, float y) const { return pair_of(x, y); }
    float log2(float x) const { return std::log2(x); }
    float inverse(float x) const { return 1 / x; }

    uint32_t base = 0;
    std::vector<uint64_t> told;
};

template <int D, int Keys>
std::vector<uint64_t> products(bool of_values, int group, int stage, uint32_t base) {
    using Form = attention::Half<D, Keys>;
    Recorder<D, Keys> hw;
    hw.base = base;
    typename Form::template State<Recorder<D, Keys>> state;
    if (of_values) {
        Form::weigh(hw, state, stage);
    } else {
        Form::score(hw, state, group, stage);
    }
    return hw.told;
}

template <int D>
void store_attention(int group, const float* from, uint16_t* out) {
    Recorder<D> hw;
    typename attention::Half<D>::template State<Recorder<D>> state;
    std::copy(from, from + 128 * D / 2, &state.output.value[0][0]);
    std::fill(&state.total.value[0][0], &state.total.value[0][0] + 256, 1.0f);
    attention::Attention s = {};
    s.heads = s.batch = 1;
    s.queries = attention::kQueries;
    attention::store<attention::Half<D>>(hw, s, {0, 0, 0, attention::kQueries, 0}, group, false, state, out, nullptr);
}

// With 8-bit values: three registers' worth less of weights, and the raw scores of their own.
template <int D>
struct Recorder8 : Recorder<D> {
    template <typename T, int Count>
    using Registers = typename Recorder<D>::template Registers<T, Count>;
    using Raw = Registers<float, attention::kKeys / 2>;
    using Weights = Registers<uint32_t, attention::kKeys / 8>;

    template <bool Add>
    void scores(Raw&, uint64_t queries, uint64_t keys) {
        this->told.insert(this->told.end(), {queries, keys, uint64_t{Add}});
    }
    template <bool Add>
    void values(typename Recorder<D>::Output&, Weights&, int step, uint64_t values) {
        this->told.insert(this->told.end(), {static_cast<uint64_t>(step), values, uint64_t{Add}});
    }
    // Numbers up to 255 in the place of values.
    uint32_t pack8(float a, float b, float c, float d) const {
        return static_cast<uint32_t>(a) | static_cast<uint32_t>(b) << 8 | static_cast<uint32_t>(c) << 16 |
               static_cast<uint32_t>(d) << 24;
    }
};

template <int D>
std::vector<uint64_t> products8(bool of_values, int group, int stage, uint32_t base) {
    Recorder8<D> hw;
    hw.base = base;
    typename attention::Eight<D>::template State<Recorder8<D>> state;
    if (of_values) {
        attention::Eight<D>::weigh(hw, state, stage);
    } else {
        attention::Eight<D>::score(hw, state, group, stage);
    }
    return hw.told;
}

// A consumer of the convolution over the emulator's memory, whose products are told, and whose panels go to `out`.
template <int N>
struct ConvRecorder {
    template <typename T, int Count>
    struct Registers {
        T value[128][Count];
        T& at(int thread, int i) { return value[thread][i]; }
    };
    using Accumulators = Registers<float, N / 2>;
    using Left = Registers<uint32_t, 16>;

    uint32_t address(int, int stage) const { return memory.address(stage * conv::kPixels * conv::kRow); }
    template <typename Function>
    void each(Function function) {
        for (int thread = 0; thread < 128; ++thread) function(thread);
    }
    // ldmatrix and stmatrix, as CuTe has them: thread t has word t of each matrix, whose rows the threads of a quarter
    // tell.
    template <typename Address>
    uint32_t row(Address address, int thread, int matrix) {
        return address(thread / 32 * 32 + matrix * 8 + thread % 32 / 4) + thread % 4 * 4;
    }
    template <int Depth, typename Address>
    void read_left(Left& left, Address address) {
        for (int i = 0; i < 128 * 4 * Depth; ++i) {
            const int thread = i % 128, matrix = i / 128 % 4, k = i / 512;
            left.value[thread][4 * k + matrix] = memory.get(
                row([&](int lane) { return address(lane) ^ static_cast<uint32_t>(k * 32); }, thread, matrix));
        }
    }
    template <typename Address>
    void write_words(const conv::Ring&, Registers<uint32_t, 4>& words, Address address) {
        for (int i = 0; i < 512; ++i) memory.put(row(address, i / 4, i % 4), words.value[i / 4][i % 4]);
    }
    template <typename Any>
    void begin(Any&) {}
    void commit() {}
    template <int Pending>
    void drain(Accumulators&) {}
    void mma(Accumulators&, Left&, int k, uint64_t right) {
        told.insert(told.end(), {static_cast<uint64_t>(k), right});
    }
    void wait_full(int, const conv::Ring&) {}
    void show_words(int) {}
    void wait_stored() {}
    void release(int, const conv::Ring&) {}
    void store_box(int, uint32_t from, int n, int w, int h, int t, int b) { memory.store(out, from, {n, w, h, t, b}); }
    void unpack(uint32_t, float& x, float& y) const { x = y = 0; }
    uint32_t pack(float x, float y) const { return pair_of(x, y); }

    emulated::Memory memory{1024, conv::kPixelArea, true};
    emulated::Map out = {};
    std::vector<uint64_t> told;
};

conv::Conv conv_shape(int tile_w, int box_w, int outputs) {
    conv::Conv s = {};
    s.tile_w = s.width = tile_w;
    s.height = conv::kPixels / tile_w;
    s.box_w = box_w;
    s.box_h = s.height;
    s.outputs = outputs;
    s.places = 1;
    return s;
}

template <int N>
std::vector<uint64_t> steps(int depth, uint32_t base) {
    ConvRecorder<N> hw;
    conv::State<ConvRecorder<N>> state = {};
    const uint32_t pixels = hw.address(0, 0);
    if (depth == 4) conv::multiply<4>(hw, state, pixels, 0, base);
    if (depth == 3) conv::multiply<3>(hw, state, pixels, 0, base);
    if (depth == 2) conv::multiply<2>(hw, state, pixels, 0, base);
    if (depth == 1) conv::multiply<1>(hw, state, pixels, 0, base);
    return hw.told;
}

template <int N>
void store_conv(int group, const float* from, uint16_t* out) {
    constexpr uint64_t kWide = 64, kPixelBytes = N * 2, kRowBytes = kWide * kPixelBytes;
    ConvRecorder<N> hw;
    hw.out = {out,
              5,
              {N, kWide, 4, 1, 1},
              {kPixelBytes, kRowBytes, 4 * kRowBytes, 4 * kRowBytes},
              {32, kWide, 1, 1, 1},
              {1, 1, 1, 1, 1}};
    conv::State<ConvRecorder<N>> state;
    conv::Rings rings;
    std::copy(from, from + 128 * N / 2, &state.sums.value[0][0]);
    conv::store<N, conv::Kind::kPlain>(hw, state, conv_shape(kWide, kWide, N), {}, group, rings);
}

int give(const std::vector<uint64_t>& told, uint64_t* to) {
    std::copy(told.begin(), told.end(), to);
    return static_cast<int>(told.size());
}

// A tensor [rows, columns] as a kernel loads it: panels of 64 columns, one behind the other.
emulated::Memory loaded(uint16_t* tensor, int rows, int columns, uint32_t base) {
    emulated::Memory memory(base, rows * columns * 2, true);
    const auto extent = [](int size) { return static_cast<uint64_t>(size); };
    const emulated::Map map = {
        tensor,         2, {extent(columns), extent(rows)}, {extent(columns) * 2}, {64, static_cast<uint32_t>(rows)},
        {1, 1, 1, 1, 1}};
    for (int panel = 0; panel < columns / 64; ++panel) {
        memory.load(map, base + static_cast<uint32_t>(panel * rows * 128), {panel * 64, 0});
    }
    return memory;
}

}  // namespace

extern "C" {

int probe_attention_stages(int keys, int head_dim, int value_bytes) {
    return attention::room_of(keys, head_dim, value_bytes).stages();
}
// (a, b, whether it is added) of every product of scores, (step, b) of those of values; how many numbers they are.
int probe_attention(int keys, int head_dim, int of_values, int group, int stage, uint32_t base, uint64_t* to) {
    const auto made = head_dim == 64 ? products<64, 128> : keys == 128 ? products<128, 128> : products<128, 176>;
    return give(made(of_values, group, stage, base), to);
}
// scores [128 threads, 88] -> weights [128 threads, 44]
void probe_weights(const float* scores, uint32_t* weights) {
    using Wide = Recorder<128, 176>;
    Wide hw;
    attention::Half<128, 176>::State<Wide> state;
    std::copy(scores, scores + 128 * 88, &state.scores.value[0][0]);
    attention::Half<128, 176>::round(hw, state);
    std::copy(&state.weights.value[0][0], &state.weights.value[0][0] + 128 * 44, weights);
}
// The same of 8-bit values: (a, b, whether it is added) of scores, (step, b, whether it is added) of values.
int probe_attention8(int head_dim, int of_values, int group, int stage, uint32_t base, uint64_t* to) {
    return give(
        head_dim == 64 ? products8<64>(of_values, group, stage, base) : products8<128>(of_values, group, stage, base),
        to);
}
// scores [128 threads, 64], numbers up to 255 -> weights [128 threads, 16]
void probe_weights8(const float* scores, uint32_t* weights) {
    Recorder8<64> hw;
    attention::Eight<64>::State<Recorder8<64>> state;
    std::copy(scores, scores + 128 * 64, &state.scores.value[0][0]);
    attention::Eight<64>::round(hw, state);
    std::copy(&state.weights.value[0][0], &state.weights.value[0][0] + 128 * 16, weights);
}
int probe_key_of_slot(int slot) {
    return attention::key_of_slot(slot);
}
// Shared memory as it lies after a load of [rows, columns] bytes, 64 or 128 of them; what a descriptor reads, [rows,
// 32].
void probe_loaded8(uint8_t* tensor, int rows, int columns, uint32_t base, uint64_t told, uint8_t* to, uint8_t* read) {
    emulated::Memory memory(base, rows * columns, true);
    const auto extent = [](int size) { return static_cast<uint64_t>(size); };
    const emulated::Map map = {tensor,
                               2,
                               {extent(columns), extent(rows)},
                               {extent(columns)},
                               {static_cast<uint32_t>(columns), static_cast<uint32_t>(rows)},
                               {1, 1, 1, 1, 1},
                               1};
    memory.load(map, base, {0, 0});
    for (int i = 0; i < rows * columns; ++i) to[i] = memory.byte(base + static_cast<uint32_t>(i));
    const std::vector<uint8_t> made = memory.bytes_of(told, rows);
    std::copy(made.begin(), made.end(), read);
}
// (thread, value) of a register of a left matrix of 8-bit values.
void probe_left_holder8(int row, int k, int* to) {
    const auto [thread, value] = emulated::left_holder8(row, k);
    to[0] = thread;
    to[1] = value;
}
// output [128 threads, D / 2] of a group -> out [128 queries, D]
void probe_attention_store(int head_dim, int group, const float* output, uint16_t* out) {
    head_dim == 64 ? store_attention<64>(group, output, out) : store_attention<128>(group, output, out);
}

// (step of the left matrix, b) of every product of a tap whose weights begin at `base`.
int probe_conv(int width, int depth, uint32_t base, uint64_t* to) {
    return give(width == 96 ? steps<96>(depth, base) : steps<128>(depth, base), to);
}
// A box [rows, 64] -> left matrices [128 threads, 16] of a tap `shift` rows behind the first one.
void probe_conv_left(uint16_t* box, int rows, int tile_w, int box_w, int group, int shift, uint32_t* to) {
    ConvRecorder<96> hw;
    conv::State<ConvRecorder<96>> state;
    const conv::Conv s = conv_shape(tile_w, box_w, 96);
    hw.memory = loaded(box, rows, 64, 1024);
    for (int thread = 0; thread < 128; ++thread) state.row.at(thread, 0) = conv::first_row(s, group, thread);
    conv::multiply<4>(hw, state, 1024, shift, 0);
    std::copy(&state.left.value[0][0], &state.left.value[0][0] + 128 * 16, to);
}
// acc [128 threads, N / 2] of a group -> out [256 pixels, N]
void probe_conv_store(int width, int group, const float* acc, uint16_t* out) {
    width == 96 ? store_conv<96>(group, acc, out) : store_conv<128>(group, acc, out);
}

// The emulator: shared memory as it lies after a load; what a descriptor reads of it, [count, 16] or [16, count].
void probe_loaded(uint16_t* tensor, int rows, int columns, uint32_t base, uint16_t* to) {
    emulated::Memory memory = loaded(tensor, rows, columns, base);
    for (int i = 0; i < rows * columns; ++i) to[i] = memory.word(base + static_cast<uint32_t>(2 * i));
}
void probe_read(uint16_t* tensor, int rows, int columns, uint32_t base, uint64_t told, int across, int count,
                float* to) {
    emulated::Memory memory = loaded(tensor, rows, columns, base);
    const std::vector<float> made = across ? memory.transposed(told, count) : memory.matrix(told, count);
    std::copy(made.begin(), made.end(), to);
}
// (thread, value) of an accumulator; of a register of the left matrix.
void probe_holders(int row, int column, int* to) {
    const auto [thread, value] = emulated::holder(row, column);
    const auto [left_thread, left_value] = emulated::left_holder(row, column % 16);
    const int all[4] = {thread, value, left_thread, left_value};
    std::copy(all, all + 4, to);
}
}
