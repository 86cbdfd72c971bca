// A block of the convolution, for any hardware: sm_90a (conv_sm90.h) or one that tests interpret on the CPU.
//
// One warp is the producer: TMA loads a box of 128 pixels x 64 channels, moved by the tap, and the tap's weights into a
// ring of stages; what lies beyond the border is zero because TMA makes it so. Two warpgroups are consumers: each
// multiplies 64 pixels by all of the tile's channels, accumulates in fp32, and stores its half.
//
// A hardware has, of a stage s: wait_empty(s, parity), expect(s, bytes), load_pixels(s, past, c, w, h, t, b),
// load_weights(s, c, tap, n), wait_full(s, parity), release(s); address(s), Accumulators with at(thread, i),
// begin(acc), mma(acc, a, b), commit(acc), drain<pending>(acc); pack(x, y), unpack(word).
#pragma once

#include "conv.h"

namespace fastvid::conv {

// The producer's loop; weights are [places N, taps, C].
template <int N, typename Hardware>
FASTVID_ANY void produce(Hardware& hw, const Conv& s, const Tile& tile) {
    const int end = all_steps(s);
    int stage = 0;
    uint32_t parity = 0;
    for (int number = first_step(s, tile); number < end; ++number) {
        const Step step = step_of(s, tile, number);
        hw.wait_empty(stage, parity ^ 1);
        hw.expect(stage, stage_bytes(N));
        hw.load_pixels(stage, step.from_past, step.c, step.w, step.h, step.t, tile.b);
        hw.load_weights(stage, step.c, step.tap, tile.place * s.outputs + tile.n);
        if (++stage == stages(N)) {
            stage = 0;
            parity ^= 1;
        }
    }
}

// The products of one step, without waiting for them. Depth is known to the compiler: behind a choice for each product
// it would fence each of them.
template <int Depth, typename Hardware>
FASTVID_ANY void multiply(Hardware& hw, typename Hardware::Accumulators& acc, uint32_t pixels, uint32_t weights) {
    hw.begin(acc);
    FASTVID_UNROLL
    for (int k = 0; k < Depth; ++k) {
        hw.mma(acc, descriptor(pixels + k * kDepth * 2), descriptor(weights + k * kDepth * 2));
    }
    hw.commit(acc);
}

template <typename Hardware>
FASTVID_ANY void multiply(Hardware& hw, typename Hardware::Accumulators& acc, int stage, int group, int depth) {
    const uint32_t pixels = hw.address(stage) + group * (kPixels / 2 * kRow);
    const uint32_t weights = hw.address(stage) + kPixelBytes;
    static_assert(kChannels == 4 * kDepth, "a step has up to four products");
    switch (depth) {
        case 4:
            return multiply<4>(hw, acc, pixels, weights);
        case 3:
            return multiply<3>(hw, acc, pixels, weights);
        case 2:
            return multiply<2>(hw, acc, pixels, weights);
        default:
            return multiply<1>(hw, acc, pixels, weights);
    }
}

// A consumer's loop: a stage is given back when the products of the step after it are on their way.
template <int N, typename Hardware>
FASTVID_ANY void consume(Hardware& hw, typename Hardware::Accumulators& acc, const Conv& s, const Tile& tile,
                         int group) {
    const int end = all_steps(s), first = first_step(s, tile), many = chunks(s);
    const int last_depth = step_of(s, tile, many - 1).depth;
    int stage = 0, before = 0, chunk = 0;
    uint32_t parity = 0;
    for (int number = first; number < end; ++number) {
        hw.wait_full(stage, parity);
        const bool last = ++chunk == many;
        multiply(hw, acc, stage, group, last ? last_depth : kChannels / kDepth);
        if (number > first) {
            hw.template drain<1>(acc);
            hw.release(before);
        }
        if (last) chunk = 0;
        before = stage;
        if (++stage == stages(N)) {
            stage = 0;
            parity ^= 1;
        }
    }
    hw.template drain<0>(acc);
}

// Bias, what is added to, and the store: a thread has two neighbouring channels, 4 bytes, of two pixels.
template <int N, typename Hardware>
FASTVID_ANY void store(const Hardware& hw, const typename Hardware::Accumulators& acc, const Conv& s, const Tile& tile,
                       int group, int thread, const uint16_t* bias, uint16_t* out) {
    const int pixel = group * (kPixels / 2);
    const int64_t to[2] = {offset_of(s, tile, pixel + row_of(thread, 0)),
                           offset_of(s, tile, pixel + row_of(thread, 1))};
    FASTVID_UNROLL
    for (int eight = 0; eight < N / 8; ++eight) {
        const int n = tile.n + column_of(thread, eight);
        if (n >= s.outputs) continue;
        float first = 0, second = 0;
        hw.unpack(*reinterpret_cast<const uint32_t*>(bias + n), first, second);
        const int64_t channel = channel_offset(s, n);
        FASTVID_UNROLL
        for (int half = 0; half < 2; ++half) {
            if (to[half] < 0) continue;
            uint32_t* at = reinterpret_cast<uint32_t*>(out + to[half] + channel);
            float x = acc.at(thread, eight * 4 + half * 2) + first,
                  y = acc.at(thread, eight * 4 + half * 2 + 1) + second;
            if (s.add) {
                float a, b;
                hw.unpack(*at, a, b);
                x += a;
                y += b;
            }
            *at = hw.pack(x, y);
        }
    }
}

}  // namespace fastvid::conv
