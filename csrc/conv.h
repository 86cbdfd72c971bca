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

constexpr int kGroups = 4;                       // warpgroups of consumers
constexpr int kGroupPixels = 64;                 // of a tile, for each of them
constexpr int kPixels = kGroups * kGroupPixels;  // of a tile
constexpr int kChannels = 64;                    // of a box: 128 bytes, a row of the 128-byte swizzle
constexpr int kConsumers = kGroups * 4;          // warps
constexpr int kThreads = kConsumers * 32 + 128;  // and the producer's warpgroup, of which one thread works
// Of a thread, which 640 of them have 96 of at first: 4 x 112 + 24 are at most 5 x 96.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 112;
constexpr int kPixelArea = 128 * 1024;  // bytes of the ring of boxes
constexpr int kWeightArea = 96 * 1024;  // and of that of weights
constexpr int kMostPixelStages = 4;
constexpr int kBarrierBytes = 1024;               // behind both rings, which begin at multiples of 1,024
constexpr int kMemory = 227 * 1024;               // that a block can have
constexpr int kMostRows = kPixelArea / 2 / kRow;  // of a box, so that there are two of them
constexpr int kPanel = 32;                        // channels that are stored at once: 64 bytes
constexpr int kPanelRow = kPanel * kBytes;        // a row of the 64-byte swizzle
constexpr int kPanelBytes = kPixels * kPanelRow;
constexpr int kStagePanels = 2;                          // of a stage of pixels, once they are multiplied
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of a grid

static_assert(kStagePanels * kPanelBytes == kPixels * kRow, "a stage has at least a tile's pixels of 64 channels");

// What becomes of a tile: it is stored; added to what is there; or one half of its channels goes to the frame after.
enum class Kind { kPlain, kAdd, kSplit };

// What a launch makes.
struct Conv {
    int batch, frames, height, width;  // of the result, before its pixels or frames are doubled
    int channels, outputs;             // C, and N of one place: both halves where frames are interleaved
    int kt, kh, kw;                    // taps
    int history;                       // P
    int past;                          // 1: its frames are given, 0: they are zeros
    int first_h, first_w;              // of x, that the first tap of the first pixel sees
    int stride, stride_t;              // in space and in time
    int places;                        // 1, or 4
    int tile_w;                        // pixels of a tile's row, a power of 2 up to 64; it has kPixels / tile_w rows
    int span_h, span_w;                // taps that one box serves: all of a frame, or one
    int box_h, box_w;                  // pixels of a box: those of a tile, and what its other taps see beside them
};

// Tiles that read the same pixels follow one another: channels first, then places, columns, rows, frames.
struct Tile {
    int n, place, w, h, t, b;  // first channel of the result, place, first pixel, frame, batch
};

// Pixels of x or of past that a product reads, and which of the weights.
struct Box {
    int from_past;
    int c, w, h, t;  // coordinates in the map of x or past; some may lie outside, where TMA gives zeros
    int tap;         // the first one that it serves
    int depth;       // wgmmas: channels beyond the last are left out in sixteens
};

// Which stage of a ring is next, and the parity of its round.
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    FASTVID_ANY void next(int stages) {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

FASTVID_ANY int tile_h(const Conv& s) {
    return kPixels / s.tile_w;
}

FASTVID_ANY int chunks(const Conv& s) {
    return divide_up(s.channels, kChannels);
}

FASTVID_ANY int64_t tiles(const Conv& s, int tile_n) {
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

// Boxes of a frame of taps and a chunk of channels; boxes of a tile: frames of taps, in each of them chunks.
FASTVID_ANY int parts(const Conv& s) {
    return s.kh * s.kw / (s.span_h * s.span_w);
}

FASTVID_ANY int all_boxes(const Conv& s) {
    return s.kt * chunks(s) * parts(s);
}

// Without a past, taps before the first frame see zeros: they are left out.
FASTVID_ANY int first_box(const Conv& s, const Tile& tile) {
    const int t0 = tile.t * s.stride_t - s.history;
    return s.past || t0 >= 0 ? 0 : -t0 * chunks(s) * parts(s);
}

FASTVID_ANY int depth_of(const Conv& s, int number) {
    const int left = divide_up(s.channels - number / parts(s) % chunks(s) * kChannels, kDepth);
    return left < kChannels / kDepth ? left : kChannels / kDepth;
}

FASTVID_ANY Box box_of(const Conv& s, const Tile& tile, int number) {
    const int part = number % parts(s), c = number / parts(s) % chunks(s), i = number / parts(s) / chunks(s);
    const int tap = part * s.span_h * s.span_w, t = tile.t * s.stride_t - s.history + i;
    Box box;
    box.from_past = t < 0;
    box.c = c * kChannels;
    box.w = tile.w * s.stride + s.first_w + tap % s.kw + tile.place % 2;
    box.h = tile.h * s.stride + s.first_h + tap / s.kw + tile.place / 2;
    box.t = t < 0 ? t + s.history : t;
    box.tap = i * s.kh * s.kw + tap;
    box.depth = depth_of(s, number);
    return box;
}

// Shared memory: the ring of boxes, that of weights, their barriers.
FASTVID_ANY int box_bytes(const Conv& s) {
    return s.box_h * s.box_w * kRow;
}
FASTVID_ANY int pixel_stage_bytes(const Conv& s) {
    return divide_up(box_bytes(s), 1024) * 1024;
}
FASTVID_ANY int pixel_stages(const Conv& s) {
    const int fit = kPixelArea / pixel_stage_bytes(s);
    return fit < kMostPixelStages ? fit : kMostPixelStages;
}
FASTVID_ANY constexpr int weight_bytes(int tile_n) {
    return tile_n * kRow;
}
FASTVID_ANY constexpr int weight_stages(int tile_n) {
    return kWeightArea / weight_bytes(tile_n);
}
constexpr int kSmem = kPixelArea + kWeightArea + kBarrierBytes;
static_assert(kSmem <= kMemory, "shared memory");

// Stages of pixels that a tile's panels take: as many as leave each at most two.
FASTVID_ANY constexpr int panel_stages(int tile_n) {
    return (tile_n / kPanel + kStagePanels - 1) / kStagePanels;
}

// The row of a box that a thread's pixel sees with the first tap: a thread has the address of one of sixteen pixels of
// its warp, as ldmatrix wants it.
FASTVID_ANY int lane_pixel(int group, int thread) {
    return group * kGroupPixels + thread / 32 * 16 + thread % 16;
}
FASTVID_ANY int first_row(const Conv& s, int group, int thread) {
    const int pixel = lane_pixel(group, thread);
    return pixel / s.tile_w * s.box_w + pixel % s.tile_w;
}
// Where it reads 8 channels of a row, the first or the second eight of 16; those of the next 16 lie 32 bytes on before
// the swizzle, so behind it they are this ^ 32.
FASTVID_ANY uint32_t left_address(uint32_t box, int row, int thread) {
    return swizzled(box + row * kRow + thread % 32 / 16 * 16);
}
// The same in a panel: 8 channels from `chunk` on, or the next 8.
FASTVID_ANY uint32_t panel_address(uint32_t panel, int group, int thread, int chunk) {
    const uint32_t at = panel + lane_pixel(group, thread) * kPanelRow + (chunk + thread % 32 / 16) * 16;
    return at ^ (at >> 7 & 3) << 4;
}

constexpr int kWidths[] = {128, 96};  // channels of the result that a tile has

// The width that leaves the least over, the wider of two.
inline int choose_width(int outputs) {
    int best = kWidths[0];
    for (const int width : kWidths) {
        if (divide_up(outputs, width) * width < divide_up(outputs, best) * best) best = width;
    }
    return best;
}

// The form of a tile that leaves the least over; of equals the one nearest to a square, whose border is short.
inline int choose_tile_w(int height, int width) {
    int best = 0;
    int64_t least = 0;
    for (const int w : {16, 32, 8, 64}) {
        const int64_t made = int64_t{1} * divide_up(width, w) * divide_up(height, kPixels / w);
        if (best == 0 || made < least) {
            best = w;
            least = made;
        }
    }
    return best;
}

}  // namespace fastvid::conv
