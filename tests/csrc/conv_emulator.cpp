// The convolution's kernel on the CPU: conv_kernel.h over the hardware of emulated.h. The producer and the consumer
// warpgroups are threads, so that a ring which hands out a stage too early or never is seen.
#include <algorithm>
#include <type_traits>

#include "conv_call.h"
#include "conv_kernel.h"
#include "vae_norm.h"
#include "warpgroup.h"

using namespace fastvid::conv;
using emulated::copy;
using emulated::narrow;
using emulated::Stopped;
using emulated::widen;

namespace {

// Barriers of a ring's stages: those of pixels, then those of weights.
int pair_of(int ring, int stage) {
    return ring == kPixelRing ? stage : kMostPixelStages + stage;
}

// What a block's warpgroups share; base: where shared memory begins, so that addresses are not small by chance.
template <int N>
struct Block : emulated::Block {
    Block(const std::vector<Map>& maps, const Conv& s, bool bf16, uint32_t base)
        : emulated::Block(base, kPixelArea + kWeightArea, bf16, expected()), maps(maps), stage(pixel_stage_bytes(s)) {}

    std::vector<Map> maps;  // of x, past, weights, and of out
    int stage;

  private:
    static std::vector<int> expected() {
        std::vector<int> made;
        for (int i = 0; i < pair_of(kWeightRing, weight_stages(N)); ++i) made.insert(made.end(), {1, kConsumers});
        return made;
    }
};

// A warpgroup's view of it.
template <int N>
class Emulated : public emulated::Warpgroup {
  public:
    template <typename T, int Count>
    using Registers = emulated::Registers<T, Count>;
    using Accumulators = Registers<float, N / 2>;
    using Left = Registers<uint32_t, 16>;

    explicit Emulated(Block<N>& block) : Warpgroup(block), block_(block) {}

    void wait_empty(int ring, const Ring& at) { wait(2 * pair_of(ring, at.stage) + 1, at.parity ^ 1); }
    void wait_full(int ring, const Ring& at) { wait(2 * pair_of(ring, at.stage), at.parity); }
    void expect(int ring, const Ring& at, int bytes) { Warpgroup::expect(2 * pair_of(ring, at.stage), bytes); }
    void release(int ring, const Ring& at) {
        if (ring == kPixelRing && !stores_.empty()) throw Stopped("a stage is handed back while TMA reads it");
        hand_back(2 * pair_of(ring, at.stage) + 1);
    }
    uint32_t address(int ring, int stage) const {
        return memory().address(ring == kPixelRing ? stage * block_.stage : kPixelArea + stage * weight_bytes(N));
    }

    void load_pixels(const Ring& at, int from_past, int c, int w, int h, int t, int b) {
        load(kPixelRing, at, from_past ? 1 : 0, 0, {c, w, h, t, b});
    }
    void load_weights(const Ring& at, int c, int tap, int n) { load(kWeightRing, at, 2, 0, {c, tap, n}); }
    void load_panel(const Ring& at, int panel, int group, int n, int w, int h, int t, int b) {
        load(kPixelRing, at, 3, panel * kPanelBytes + group * (kGroupPixels * kPanelRow), {n, w, h, t, b});
    }
    // What TMA stores it reads as late as it may: when it is waited for.
    void store_box(int which, uint32_t from, int n, int w, int h, int t, int b) {
        if (written_) throw Stopped("a panel is stored before it is shown");
        stores_.push_back(
            [this, which, from, n, w, h, t, b] { memory().store(block_.maps.at(3 + which), from, {n, w, h, t, b}); });
    }
    void wait_stored() {
        for (const auto& store : stores_) store();
        stores_.clear();
    }

    template <int Depth, typename Address>
    void read_left(Left& left, Address address) {
        for (int k = 0; k < Depth; ++k) {
            each_word([&](int thread) { return address(thread) ^ static_cast<uint32_t>(k * 32); },
                      [&](int thread, int i, uint32_t at) { left.at(thread, 4 * k + i) = read(at); });
        }
    }
    template <typename Address>
    void read_words(Registers<uint32_t, 4>& words, Address address) {
        each_word(address, [&](int thread, int i, uint32_t at) { words.at(thread, i) = read(at); });
    }
    template <typename Address>
    void write_words(const Ring& ring, const Registers<uint32_t, 4>& words, Address address) {
        if (!holds(pair_of(kPixelRing, ring.stage))) throw Stopped("a stage is written that was not waited for");
        written_ = true;
        each_word(address, [&](int thread, int i, uint32_t at) {
            const uint32_t stage = this->address(kPixelRing, ring.stage);
            if (at < stage || at >= stage + static_cast<uint32_t>(block_.stage)) throw Stopped("a stage is left");
            memory().put(at, words.at(thread, i));
        });
    }
    void show_words(int) { written_ = false; }

    void mma(Accumulators& sums, Left& left, int k, uint64_t right) {
        later({right}, {&sums, &left}, [this, &sums, &left, k, right] { multiply_now(sums, left, k, right); });
    }
    template <int Pending>
    void drain(Accumulators&) {
        finish(Pending);
    }

    void unpack(uint32_t word, float& x, float& y) const {
        x = widen(static_cast<uint16_t>(word), memory().bf16());
        y = widen(static_cast<uint16_t>(word >> 16), memory().bf16());
    }
    uint32_t pack(float x, float y) const {
        return narrow(x, memory().bf16()) | uint32_t{narrow(y, memory().bf16())} << 16;
    }

  private:
    void load(int ring, const Ring& at, int map, int behind, const std::vector<int64_t>& from) {
        load_box(block_.maps.at(map), address(ring, at.stage) + behind, 2 * pair_of(ring, at.stage), from);
    }
    uint32_t read(uint32_t at) {
        check_held(at);
        return memory().get(at);
    }

    // wgmma m64nNk16, the left matrix in registers, the right one with rows along K in shared memory, as its descriptor
    // says.
    void multiply_now(Accumulators& sums, const Left& left, int k, uint64_t told) {
        const std::vector<float> right = memory().matrix(told, N);
        std::vector<float> across(kDepth * N), sum(N);
        for (int i = 0; i < kDepth * N; ++i) across[i] = right[i % N * kDepth + i / N];
        for (int row = 0; row < 64; ++row) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int depth = 0; depth < kDepth; ++depth) {
                const auto [thread, value] = emulated::left_holder(row, depth);
                const uint32_t word = left.value[thread][4 * k + value];
                const float x = widen(static_cast<uint16_t>(word >> depth % 2 * 16), memory().bf16());
                for (int col = 0; col < N; ++col) sum[col] += x * across[depth * N + col];
            }
            for (int col = 0; col < N; ++col) {
                const auto [thread, value] = emulated::holder(row, col);
                sums.value[thread][value] += sum[col];
            }
        }
    }

    Block<N>& block_;
    bool written_ = false;  // what TMA does not see yet
    std::vector<std::function<void()>> stores_;
};

constexpr int64_t kGrid = 2;  // blocks of a launch, so that each makes several tiles

template <int N, Kind K>
void run(const Call& call, const void* x, const void* past, const void* weight, const void* bias, void* out,
         bool bf16) {
    const Conv s = conv_of(call);
    const Map now = map_of_pixels(call, s, x, call.x[2], call.x_strides);
    const Map before = call.past ? map_of_pixels(call, s, past, call.history, call.past_strides) : now;
    std::vector<Map> maps = {now, before, map_of_weights(call, s, weight, N)};
    for (int i = 0; i < outs_of(call); ++i) maps.push_back(map_of_out(call, s, out, i));
    for (int64_t number = 0; number < std::min(kGrid, tiles(s, N)); ++number) {
        Block<N> block(maps, s, bf16, static_cast<uint32_t>(1024 * (1 + number % 3)));
        emulated::beside_each_other(kGroups + 1, [&](int who) {
            Emulated<N> hw(block);
            if (who == kGroups) return produce<N, K>(hw, s, number, kGrid);
            const auto state = std::make_unique<State<Emulated<N>>>();
            consume<N, K>(hw, *state, s, who, number, kGrid, static_cast<const uint16_t*>(bias));
        });
        block.check_rest();
    }
}

template <int N>
void run(const Call& call, const void* x, const void* past, const void* weight, const void* bias, void* out,
         bool bf16) {
    switch (kind_of(call)) {
        case Kind::kAdd:
            return run<N, Kind::kAdd>(call, x, past, weight, bias, out, bf16);
        case Kind::kSplit:
            return run<N, Kind::kSplit>(call, x, past, weight, bias, out, bf16);
        default:
            return run<N, Kind::kPlain>(call, x, past, weight, bias, out, bf16);
    }
}

namespace norm = fastvid::norm;

struct Math {
    bool bf16;
    float off;
    void unpack(uint32_t word, float& a, float& b) const {
        a = widen(static_cast<uint16_t>(word), bf16);
        b = widen(static_cast<uint16_t>(word >> 16), bf16);
    }
    uint32_t pack(float a, float b) const { return narrow(a, bf16) | uint32_t{narrow(b, bf16)} << 16; }
    // Relative errors of ex2.approx, rcp.approx and rsqrt.approx, as the PTX manual bounds them; no subnormal numbers.
    float exp2(float x) const { return flushed(std::exp2(double{x}) * (1 + off * std::ldexp(1.0, -22))); }
    float reciprocal(float x) const { return flushed(1 / double{x} * (1 + off * std::ldexp(1.0, -23))); }
    float rsqrt(float x) const { return flushed(1 / std::sqrt(double{x}) * (1 + off * std::pow(2.0, -22.4))); }
    static float flushed(double x) {
        const float made = static_cast<float>(x);
        return std::fabs(made) < std::ldexp(1.0f, -126) ? std::copysign(0.0f, made) : made;
    }
};

template <bool Silu, int Many>
void norm_pixel(const Math& math, const norm::Plan& s, const uint16_t* x, const uint16_t* gamma, uint16_t* out,
                int64_t pixel) {
    const bool inside = pixel < s.pixels;
    const norm::Offsets at = inside ? norm::offsets_of(s, pixel) : norm::Offsets{0, 0};
    float total = 0;
    std::vector<uint16_t> spare(s.vectors * norm::kVector);  // what is written before the sum is known
    const auto lane_of = [&](int lane, uint16_t* to, auto sum) {
        if (s.wide) return norm::run_wide<Silu, Many>(math, s, x + at.x, gamma, to, lane, inside, sum);
        const auto part = norm::load<Many>(s, x + at.x, lane, 0, inside);
        norm::run<Silu>(math, s, part, norm::load<Many>(s, gamma, lane, 0, true), to, lane, inside, sum);
    };
    for (int lane = 0; lane < 1 << s.log_lanes; ++lane) {
        lane_of(lane, spare.data(), [&](float part) { return total += part; });
    }
    for (int lane = 0; lane < 1 << s.log_lanes; ++lane) lane_of(lane, out + at.out, [&](float) { return total; });
}

}  // namespace

extern "C" {

// 0, or 1 with the reason in `why`. width: 0 chooses it.
int conv_emulate(const Call* call, const void* x, const void* past, const void* weight, const void* bias, void* out,
                 int bf16, int width, char* why, int room) {
    try {
        const std::string reason = refuse(*call, x, past, weight, bias, out);
        if (!reason.empty()) throw Stopped(reason);
        switch (width ? width : choose_width(static_cast<int>(outputs_of(*call)))) {
            case 96:
                run<96>(*call, x, past, weight, bias, out, bf16);
                break;
            case 128:
                run<128>(*call, x, past, weight, bias, out, bf16);
                break;
            default:
                throw Stopped("no such width");
        }
    } catch (const std::exception& error) {
        copy(error.what(), why, room);
        return 1;
    }
    return 0;
}

int conv_call_words() {
    return sizeof(Call) / sizeof(int64_t);
}
int conv_width(int outputs) {
    return choose_width(outputs);
}
int conv_tile_w(int height, int width) {
    return choose_tile_w(height, width);
}
int conv_weight_stages(int width) {
    return weight_stages(width);
}
int conv_smem() {
    return kSmem;
}
// tile_w, span_h, span_w, box_h, box_w, stages of pixels
void conv_shape(const Call* call, int* told) {
    const Conv s = conv_of(*call);
    const int all[6] = {s.tile_w, s.span_h, s.span_w, s.box_h, s.box_w, pixel_stages(s)};
    std::copy(all, all + 6, told);
}
int64_t conv_tiles(const Call* call, int width) {
    return tiles(conv_of(*call), width);
}
void conv_tile(const Call* call, int width, int64_t number, int* tile) {
    const Tile made = tile_of(conv_of(*call), width, number);
    std::memcpy(tile, &made, sizeof made);
}
// Of a map of out: its first element, extents, strides in bytes.
void conv_out(const Call* call, int which, int64_t* told) {
    const Map map = map_of_out(*call, conv_of(*call), nullptr, which);
    *told++ = reinterpret_cast<int64_t>(map.base) / kBytes;
    for (int i = 0; i < 5; ++i) *told++ = static_cast<int64_t>(map.extent[i]);
    for (int i = 0; i < 4; ++i) *told++ = static_cast<int64_t>(map.stride[i]);
}
uint64_t conv_descriptor(uint32_t address) {
    return descriptor(address);
}
uint32_t conv_swizzled(uint32_t address) {
    return swizzled(address);
}

// RMS norm with every pixel's lanes one after the other; sums over them are made first. off: how far the special
// function unit's results are off, in parts of the largest error that its manual gives: -1 to 1.
int norm_emulate(const norm::Norm* shape, const uint16_t* x, const uint16_t* gamma, uint16_t* out, int bf16, float off,
                 char* why, int room) {
    const std::string reason = norm::refuse(*shape, x, gamma, out);
    if (!reason.empty()) {
        copy(reason, why, room);
        return 1;
    }
    const norm::Plan s = norm::plan_of(*shape);
    const Math math = {bf16 != 0, off};
    const auto all = [&](auto silu, auto many) {
        constexpr bool kSilu = decltype(silu)::value;
        constexpr int kMany = decltype(many)::value;
        for (int64_t pixel = 0; pixel < s.pixels + 3; ++pixel) {  // a few beyond the end, as a grid has
            norm_pixel<kSilu, kMany>(math, s, x, gamma, out, pixel);
        }
    };
    const auto with = [&](auto silu) {
        if (s.many == 3) return all(silu, std::integral_constant<int, 3>());
        return all(silu, std::integral_constant<int, 4>());
    };
    if (shape->silu) {
        with(std::true_type());
    } else {
        with(std::false_type());
    }
    return 0;
}

float norm_silu(float y, float off) {
    return norm::silu(Math{false, off}, y);
}
void norm_plan(const norm::Norm* shape, norm::Plan* plan) {
    *plan = norm::plan_of(*shape);
}
// Where a pixel begins in x and in out, counted in 32 bits or in 64.
void norm_offsets(const norm::Norm* shape, int64_t pixel, int wide, int64_t* told) {
    const norm::Plan s = norm::plan_of(*shape);
    const norm::Offsets made =
        wide ? norm::offsets_of<int64_t>(s, pixel) : norm::offsets_of<uint32_t>(s, static_cast<uint32_t>(pixel));
    told[0] = made.x;
    told[1] = made.out;
}
}
