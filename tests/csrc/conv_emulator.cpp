// The convolution's kernel on the CPU: conv_kernel.h over the hardware of emulated.h. The producer and both consumer
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

// What a block's warpgroups share; base: where shared memory begins, so that addresses are not small by chance.
template <int N>
struct Block : emulated::Block {
    Block(const Map& x, const Map& past, const Map& weights, bool bf16, uint32_t base)
        : emulated::Block(base, stages(N) * stage_bytes(N), bf16, expected()), maps{x, past, weights} {}

    Map maps[3];

  private:
    static std::vector<int> expected() {
        std::vector<int> made;
        for (int stage = 0; stage < stages(N); ++stage) made.insert(made.end(), {1, kConsumers});
        return made;
    }
};

// A warpgroup's view of it.
template <int N>
class Emulated : public emulated::Warpgroup {
  public:
    struct Accumulators : emulated::Registers<float, N / 2> {
        Accumulators() { std::memset(this->value, 0, sizeof this->value); }
    };

    explicit Emulated(Block<N>& block) : Warpgroup(block), block_(block) {}

    void wait_empty(int stage, uint32_t parity) { wait(2 * stage + 1, parity); }
    void wait_full(int stage, uint32_t parity) { wait(2 * stage, parity); }
    void expect(int stage, int bytes) { Warpgroup::expect(2 * stage, bytes); }
    void release(int stage) { hand_back(2 * stage + 1); }
    uint32_t address(int stage) const { return memory().address(stage * stage_bytes(N)); }

    void load_pixels(int stage, int from_past, int c, int w, int h, int t, int b) {
        load_box(block_.maps[from_past ? 1 : 0], address(stage), 2 * stage, {c, w, h, t, b});
    }
    void load_weights(int stage, int c, int tap, int n) {
        load_box(block_.maps[2], address(stage) + kPixelBytes, 2 * stage, {c, tap, n});
    }

    void mma(Accumulators& acc, uint64_t a, uint64_t b) {
        later({a, b}, {&acc}, [this, &acc, a, b] { multiply_now(acc, a, b); });
    }
    void commit(Accumulators&) { Warpgroup::commit(); }
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
    // wgmma m64nNk16, both matrices with rows along K in shared memory, as their descriptors say.
    void multiply_now(Accumulators& acc, uint64_t a, uint64_t b) {
        const std::vector<float> left = memory().matrix(a, 64), right = memory().matrix(b, N);
        std::vector<float> across(kDepth * N), sum(N);
        for (int i = 0; i < kDepth * N; ++i) across[i] = right[i % N * kDepth + i / N];
        for (int row = 0; row < 64; ++row) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int k = 0; k < kDepth; ++k) {
                for (int col = 0; col < N; ++col) sum[col] += left[row * kDepth + k] * across[k * N + col];
            }
            for (int col = 0; col < N; ++col) {
                const auto [thread, value] = emulated::holder(row, col);
                acc.value[thread][value] += sum[col];
            }
        }
    }

    Block<N>& block_;
};

template <int N>
void run(const Call& call, const void* x, const void* past, const void* weight, const void* bias, void* out,
         bool bf16) {
    const Conv s = conv_of(call);
    const Map now = map_of_pixels(call, s, x, call.x[2], call.x_strides);
    const Map before = call.past ? map_of_pixels(call, s, past, call.history, call.past_strides) : now;
    const Map weights = map_of_weights(call, s, weight, N);
    for (int64_t number = 0; number < blocks(s, N); ++number) {
        const Tile tile = tile_of(s, N, number);
        Block<N> block(now, before, weights, bf16, static_cast<uint32_t>(1024 * (1 + number % 3)));
        emulated::beside_each_other(3, [&](int who) {
            Emulated<N> hw(block);
            if (who == 2) return produce<N>(hw, s, tile);
            auto acc = std::make_unique<typename Emulated<N>::Accumulators>();
            consume<N>(hw, *acc, s, tile, who);
            for (int thread = 0; thread < 128; ++thread) {
                store<N>(hw, *acc, s, tile, who, thread, static_cast<const uint16_t*>(bias),
                         static_cast<uint16_t*>(out));
            }
        });
        block.check_rest();
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
            case 192:
                run<192>(*call, x, past, weight, bias, out, bf16);
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
int conv_stages(int width) {
    return stages(width);
}
int conv_smem(int width) {
    return smem_bytes(width);
}
// Offset that a pixel of a launch is stored at, -1 beyond the border; which tile makes it is told in `tile`.
int64_t conv_offset(const Call* call, int width, int64_t number, int pixel, int* tile) {
    const Conv s = conv_of(*call);
    const Tile made = tile_of(s, width, number);
    std::memcpy(tile, &made, sizeof made);
    return offset_of(s, made, pixel);
}
int64_t conv_blocks(const Call* call, int width) {
    return blocks(conv_of(*call), width);
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
