// Where everything of a convolution lies: which pixels a block makes, what a step reads, what a thread stores.
// Host and device compile the same functions; nothing here needs CUDA's headers.
//
//   out[b, t, h, w, n] = bias[n] + sum over taps (i, j, k) and c of
//                        weight[n, i, j, k, c] * x[b, t s_t + i - P, h s + j + first_h, w s + k + first_w, c]
//
// Before x's first frame come the P frames of `past`, or zeros; beyond the frame's border come zeros. `places` 4 is
// nearest upsampling with a 3x3 kernel, as a 2x2 kernel for each of the 4 places in a doubled pixel.
#pragma once

#include "sm90_layout.h"

namespace fastvid::conv {

using namespace sm90;

constexpr int kPixels = 128;                             // of a tile: 64 for each of two consumer warpgroups
constexpr int kChannels = 64;                            // of a step: 128 bytes, a row of the 128-byte swizzle
constexpr int kPixelBytes = kPixels * kRow;              // of a stage
constexpr int kConsumers = 8;                            // warps
constexpr int kThreads = kConsumers * 32 + 32;           // and the producer
constexpr int kSmem = 228 * 1024;                        // of a multiprocessor
constexpr int kReserved = 1024;                          // of it, for each block
constexpr int kBarrierBytes = 1024;                      // behind the ring, which begins at a multiple of 1,024
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of a grid

// What a launch makes; strides in elements.
struct Conv {
    int batch, frames, height, width;    // of the result, before its pixels or frames are doubled
    int channels, outputs;               // C, and N of one place: both halves where frames are interleaved
    int kt, kh, kw;                      // taps
    int history;                         // P
    int past;                            // 1: its frames are given, 0: they are zeros
    int first_h, first_w;                // of x, that the first tap of the first pixel sees
    int stride, stride_t;                // in space and in time
    int places;                          // 1, or 4
    int split;                           // 1: the second half of the channels goes to the frame after
    int add;                             // 1: out is added to
    int tile_w;                          // pixels of a tile's row, a power of 2; it has kPixels / tile_w rows
    int64_t out_b, out_t, out_h, out_w;  // strides of the result: of a pixel before doubling
    int64_t out_half;                    // from a frame to the one that it is interleaved with
    int64_t out_down, out_right;         // from one place to the next
};

// Blocks that read the same pixels follow one another: channels first, then places, columns, rows, frames.
struct Tile {
    int n, place, w, h, t, b;  // first channel of the result, place, first pixel, frame, batch
};

// What a step of the product reads: a box of pixels of x or of past, and of the weights.
struct Step {
    int from_past;
    int c, w, h, t;  // coordinates in the map of x or past; some may lie outside, where TMA gives zeros
    int tap;         // of the weights
    int depth;       // wgmmas: channels beyond the last are left out in sixteens
};

FASTVID_ANY int tile_h(const Conv& s) {
    return kPixels / s.tile_w;
}

FASTVID_ANY int chunks(const Conv& s) {
    return divide_up(s.channels, kChannels);
}

FASTVID_ANY int64_t blocks(const Conv& s, int tile_n) {
    return int64_t{1} * divide_up(s.outputs, tile_n) * s.places * divide_up(s.width, s.tile_w) *
           divide_up(s.height, tile_h(s)) * s.frames * s.batch;
}

FASTVID_ANY Tile tile_of(const Conv& s, int tile_n, int64_t number) {
    Tile tile;
    tile.n = take(number, divide_up(s.outputs, tile_n)) * tile_n;
    tile.place = take(number, s.places);
    tile.w = take(number, divide_up(s.width, s.tile_w)) * s.tile_w;
    tile.h = take(number, divide_up(s.height, tile_h(s))) * tile_h(s);
    tile.t = take(number, s.frames);
    tile.b = static_cast<int>(number);
    return tile;
}

FASTVID_ANY int all_steps(const Conv& s) {
    return s.kt * s.kh * s.kw * chunks(s);
}

// Without a past, taps before the first frame see zeros: they are left out.
FASTVID_ANY int first_step(const Conv& s, const Tile& tile) {
    const int t0 = tile.t * s.stride_t - s.history;
    return s.past || t0 >= 0 ? 0 : -t0 * s.kh * s.kw * chunks(s);
}

FASTVID_ANY Step step_of(const Conv& s, const Tile& tile, int number) {
    const int c = number % chunks(s) * kChannels, tap = number / chunks(s);
    const int k = tap % s.kw, j = tap / s.kw % s.kh, i = tap / (s.kw * s.kh);
    const int t = tile.t * s.stride_t - s.history + i, left = divide_up(s.channels - c, kDepth);
    Step step;
    step.from_past = t < 0;
    step.c = c;
    step.w = tile.w * s.stride + s.first_w + k + tile.place % 2;
    step.h = tile.h * s.stride + s.first_h + j + tile.place / 2;
    step.t = t < 0 ? t + s.history : t;
    step.tap = tap;
    step.depth = left < kChannels / kDepth ? left : kChannels / kDepth;
    return step;
}

// Offset of a tile's pixel in the result, its first channel; -1 of one beyond the border.
FASTVID_ANY int64_t offset_of(const Conv& s, const Tile& tile, int pixel) {
    const int h = tile.h + pixel / s.tile_w, w = tile.w + pixel % s.tile_w;
    if (h >= s.height || w >= s.width) return -1;
    return tile.b * s.out_b + tile.t * s.out_t + h * s.out_h + w * s.out_w + tile.place / 2 * s.out_down +
           tile.place % 2 * s.out_right;
}

// Offset of a channel from its pixel's first one; pairs stay together.
FASTVID_ANY int64_t channel_offset(const Conv& s, int n) {
    return s.split && n >= s.outputs / 2 ? n - s.outputs / 2 + s.out_half : n;
}

// The ring of stages: in which one a step lies, and the parity of its round.
FASTVID_ANY constexpr int stage_bytes(int tile_n) {
    return kPixelBytes + tile_n * kRow;
}

// As many stages as fit: two blocks on a multiprocessor where tiles are narrow, so that one stores while the other
// multiplies, else one.
FASTVID_ANY constexpr int blocks_per_sm(int tile_n) {
    return tile_n <= 128 ? 2 : 1;
}
FASTVID_ANY constexpr int stages(int tile_n) {
    return (kSmem / blocks_per_sm(tile_n) - kReserved - kBarrierBytes) / stage_bytes(tile_n);
}
FASTVID_ANY constexpr int smem_bytes(int tile_n) {
    return stages(tile_n) * stage_bytes(tile_n) + kBarrierBytes;
}

constexpr int kWidths[] = {192, 128, 96};  // channels of the result that a tile has

// The width that leaves the least over, the wider of two.
inline int choose_width(int outputs) {
    int best = kWidths[0];
    for (const int width : kWidths) {
        if (divide_up(outputs, width) * width < divide_up(outputs, best) * best) best = width;
    }
    return best;
}

// The form of 128 pixels that leaves the least over; of equals the one nearest to a square, whose border is short.
inline int choose_tile_w(int height, int width) {
    int best = 0;
    int64_t least = 0;
    for (const int w : {16, 8, 32, 64, 128}) {
        const int64_t made = int64_t{1} * divide_up(width, w) * divide_up(height, kPixels / w);
        if (best == 0 || made < least) {
            best = w;
            least = made;
        }
    }
    return best;
}

}  // namespace fastvid::conv
