// A block of the convolution, for any hardware: sm_90a (conv_sm90.h) or one that tests interpret on the CPU.
//
// One warp is the producer. TMA loads a box of pixels, 64 channels of them, into one ring, and the weights of each tap
// that the box serves into another; what lies beyond the border is zero because TMA makes it so. Four warpgroups are
// consumers: each has 64 pixels and all of the tile's channels. It reads its pixels, moved by the tap, into registers
// (a left matrix in shared memory could begin at eights of rows only), multiplies, accumulates in fp32.
//
// When a tile's boxes are multiplied, the stages behind them in the ring hold its result: panels of 32 channels, into
// which the producer has loaded what is added to. A consumer adds, rounds, and has TMA store its part, which leaves out
// what lies beyond the border. Blocks go from tile to tile, so the producer is at the next one by then.
//
// A hardware has wait_full, wait_empty, release, expect of a ring's stage, address(ring, stage), loads and stores of
// boxes, Registers with at(thread, i), each(function of a thread), reads and writes of 16 x 16 blocks of 16-bit values
// (ldmatrix and stmatrix), begin, mma, commit, drain, pack and unpack.
#pragma once

#include "conv.h"

namespace fastvid::conv {

enum RingOf { kPixelRing, kWeightRing };

// Of a consumer. row: of a box, as first_row gives it.
template <typename Hardware>
struct State {
    typename Hardware::Accumulators sums;
    typename Hardware::template Registers<uint32_t, kChannels / kDepth * 4> left;
    typename Hardware::template Registers<int, 1> row;
};

// Both rings of whoever fills or empties them.
struct Rings {
    Ring pixels, weights;
};

// The producer's side

template <int N, typename Hardware>
FASTVID_ANY void load_boxes(Hardware& hw, const Conv& s, const Tile& tile, Rings& rings) {
    const int end = all_boxes(s), taps = s.span_h * s.span_w;
    for (int number = first_box(s, tile); number < end; ++number) {
        const Box box = box_of(s, tile, number);
        hw.wait_empty(kPixelRing, rings.pixels);
        hw.expect(kPixelRing, rings.pixels, box_bytes(s));
        hw.load_pixels(rings.pixels, box.from_past, box.c, box.w, box.h, box.t, tile.b);
        rings.pixels.next(pixel_stages(s));
        for (int tap = 0; tap < taps; ++tap) {
            hw.wait_empty(kWeightRing, rings.weights);
            hw.expect(kWeightRing, rings.weights, weight_bytes(N));
            hw.load_weights(rings.weights, box.c, box.tap + tap, tile.place * s.outputs + tile.n);
            rings.weights.next(weight_stages(N));
        }
    }
}

// Stages for a tile's panels: with what is there, or as they are.
template <int N, Kind K, typename Hardware>
FASTVID_ANY void load_panels(Hardware& hw, const Conv& s, const Tile& tile, Rings& rings) {
    for (int stage = 0; stage < panel_stages(N); ++stage) {
        const int first = stage * kStagePanels, left = N / kPanel - first;
        const int many = left < kStagePanels ? left : kStagePanels;
        hw.wait_empty(kPixelRing, rings.pixels);
        hw.expect(kPixelRing, rings.pixels, K == Kind::kAdd ? many * kPanelBytes : 0);
        for (int i = 0; K == Kind::kAdd && i < many * kGroups; ++i) {
            const int panel = i / kGroups, group = i % kGroups;
            hw.load_panel(rings.pixels, panel, group, tile.n + (first + panel) * kPanel, tile.w,
                          tile.h + group * (kGroupPixels / s.tile_w), tile.t, tile.b);
        }
        rings.pixels.next(pixel_stages(s));
    }
}

// Tiles first, first + every, ...; weights are [places N, taps, C].
template <int N, Kind K, typename Hardware>
FASTVID_ANY void produce(Hardware& hw, const Conv& s, int64_t first, int64_t every) {
    Rings rings;
    const int64_t end = tiles(s, N);
    for (int64_t number = first; number < end; number += every) {
        const Tile tile = tile_of(s, N, number);
        load_boxes<N>(hw, s, tile, rings);
        load_panels<N, K>(hw, s, tile, rings);
    }
}

// A consumer's side

// Sums begin with the bias: a thread has two neighbouring channels of two pixels.
template <int N, typename Hardware>
FASTVID_ANY void begin_sums(Hardware& hw, State<Hardware>& state, const Conv& s, const Tile& tile,
                            const uint16_t* bias) {
    hw.each([&](int thread) {
        FASTVID_UNROLL
        for (int eight = 0; eight < N / 8; ++eight) {
            const int n = tile.n + column_of(thread, eight);
            float first = 0, second = 0;
            if (n < s.outputs) hw.unpack(*reinterpret_cast<const uint32_t*>(bias + n), first, second);
            FASTVID_UNROLL
            for (int half = 0; half < 2; ++half) {
                state.sums.at(thread, eight * 4 + half * 2) = first;
                state.sums.at(thread, eight * 4 + half * 2 + 1) = second;
            }
        }
    });
}

// The products of a tap, whose pixels lie `shift` rows behind those of the first. Depth is known to the compiler:
// behind a choice for each product it would fence each of them. Its four warpgroups hide that one waits for its own.
template <int Depth, typename Hardware>
FASTVID_ANY void multiply(Hardware& hw, State<Hardware>& state, uint32_t pixels, int shift, uint32_t weights) {
    hw.template read_left<Depth>(
        state.left, [&](int thread) { return left_address(pixels, state.row.at(thread, 0) + shift, thread); });
    hw.begin(state.sums);
    hw.begin(state.left);
    FASTVID_UNROLL
    for (int k = 0; k < Depth; ++k) hw.mma(state.sums, state.left, k, descriptor(weights + k * kDepth * kBytes));
    hw.commit();
    hw.template drain<0>(state.sums);
}

// All taps of a box.
template <int N, int Depth, typename Hardware>
FASTVID_ANY void multiply_box(Hardware& hw, State<Hardware>& state, const Conv& s, Rings& rings) {
    const uint32_t pixels = hw.address(kPixelRing, rings.pixels.stage);
    for (int j = 0; j < s.span_h; ++j) {
        for (int k = 0; k < s.span_w; ++k) {
            hw.wait_full(kWeightRing, rings.weights);
            const uint32_t weights = hw.address(kWeightRing, rings.weights.stage);
            multiply<Depth>(hw, state, pixels, j * s.box_w + k, weights);
            hw.release(kWeightRing, rings.weights);
            rings.weights.next(weight_stages(N));
        }
    }
}

template <int N, typename Hardware>
FASTVID_ANY void multiply_boxes(Hardware& hw, State<Hardware>& state, const Conv& s, const Tile& tile, Rings& rings) {
    static_assert(kChannels == 4 * kDepth, "a tap has up to four products");
    const int end = all_boxes(s);
    for (int number = first_box(s, tile); number < end; ++number) {
        hw.wait_full(kPixelRing, rings.pixels);
        switch (depth_of(s, number)) {
            case 4:
                multiply_box<N, 4>(hw, state, s, rings);
                break;
            case 3:
                multiply_box<N, 3>(hw, state, s, rings);
                break;
            case 2:
                multiply_box<N, 2>(hw, state, s, rings);
                break;
            default:
                multiply_box<N, 1>(hw, state, s, rings);
        }
        hw.release(kPixelRing, rings.pixels);
        rings.pixels.next(pixel_stages(s));
    }
}

// A panel of the result into shared memory, 16 channels at once.
template <Kind K, typename Hardware>
FASTVID_ANY void write_panel(Hardware& hw, State<Hardware>& state, const Ring& ring, int panel, uint32_t to,
                             int group) {
    FASTVID_UNROLL
    for (int chunk = 0; chunk < kPanel / 8; chunk += 2) {
        typename Hardware::template Registers<uint32_t, 4> words;
        const auto address = [&](int thread) { return panel_address(to, group, thread, chunk); };
        if constexpr (K == Kind::kAdd) hw.read_words(words, address);
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int at = (panel * (kPanel / 8) + chunk) * 4 + i * 2;
                float x = state.sums.at(thread, at), y = state.sums.at(thread, at + 1), a = 0, b = 0;
                if constexpr (K == Kind::kAdd) hw.unpack(words.at(thread, i), a, b);
                words.at(thread, i) = hw.pack(x + a, y + b);
            }
        });
        hw.write_words(ring, words, address);
    }
}

// The panel from shared memory: into the map of the place, or into those of the halves that it belongs to.
template <Kind K, typename Hardware>
FASTVID_ANY void store_panel(Hardware& hw, const Conv& s, const Tile& tile, int n, uint32_t from, int group) {
    const uint32_t part = from + group * (kGroupPixels * kPanelRow);
    const int h = tile.h + group * (kGroupPixels / s.tile_w), half = s.outputs / 2;
    if (n >= s.outputs) return;
    if constexpr (K != Kind::kSplit) {
        hw.store_box(tile.place, part, n, tile.w, h, tile.t, tile.b);
        return;
    }
    if (n < half) hw.store_box(0, part, n, tile.w, h, tile.t, tile.b);
    if (n + kPanel > half) hw.store_box(1, part, n - half, tile.w, h, tile.t, tile.b);
}

// What store has begun: the stages of a tile's panels go back once TMA has read them (until it has written is not
// waited for).
template <int N, typename Hardware>
FASTVID_ANY void give_back(Hardware& hw, const Conv& s, Ring ring) {
    hw.wait_stored();
    for (int stage = 0; stage < panel_stages(N); ++stage) {
        hw.release(kPixelRing, ring);
        ring.next(pixel_stages(s));
    }
}

template <int N, Kind K, typename Hardware>
FASTVID_ANY void store(Hardware& hw, State<Hardware>& state, const Conv& s, const Tile& tile, int group, Rings& rings) {
    FASTVID_UNROLL
    for (int panel = 0; panel < N / kPanel; panel += kStagePanels) {
        hw.wait_full(kPixelRing, rings.pixels);
        const uint32_t to = hw.address(kPixelRing, rings.pixels.stage);
        FASTVID_UNROLL
        for (int i = 0; i < kStagePanels && panel + i < N / kPanel; ++i) {
            write_panel<K>(hw, state, rings.pixels, panel + i, to + i * kPanelBytes, group);
        }
        hw.show_words(group);
        FASTVID_UNROLL
        for (int i = 0; i < kStagePanels && panel + i < N / kPanel; ++i) {
            store_panel<K>(hw, s, tile, tile.n + (panel + i) * kPanel, to + i * kPanelBytes, group);
        }
        rings.pixels.next(pixel_stages(s));
    }
}

// TMA reads a tile's panels while the next one's bias is on its way.
template <int N, Kind K, typename Hardware>
FASTVID_ANY void consume(Hardware& hw, State<Hardware>& state, const Conv& s, int group, int64_t first, int64_t every,
                         const uint16_t* bias) {
    Rings rings;
    Ring panels;
    const int64_t end = tiles(s, N);
    hw.each([&](int thread) { state.row.at(thread, 0) = first_row(s, group, thread); });
    for (int64_t number = first; number < end; number += every) {
        const Tile tile = tile_of(s, N, number);
        begin_sums<N>(hw, state, s, tile, bias);
        if (number > first) give_back<N>(hw, s, panels);
        multiply_boxes<N>(hw, state, s, tile, rings);
        panels = rings.pixels;
        store<N, K>(hw, state, s, tile, group, rings);
    }
    give_back<N>(hw, s, panels);
}

}  // namespace fastvid::conv
