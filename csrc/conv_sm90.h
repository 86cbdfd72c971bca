// What the convolution asks of sm_90a: TMA, mbarriers, ldmatrix and wgmma, as conv_kernel.h names them.
//
// The producer gives up registers (setmaxnreg), so that consumers have enough for 64 accumulators and a left matrix of
// 16.
#pragma once

#include "conv_kernel.h"
#include "sm90.h"
#include "words.h"

// D[64, N] += A[64, 16] B[N, 16]^T, A in registers, B in shared memory with rows along K; the flags are scale of D,
// signs of A and B, and that B is not transposed.
#define FASTVID_WGMMA(N, TYPE, NAMES, A, B, ...)                                                                \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " {" NAMES "}, {" A "}, " B ", p, 1, 1, 0;\n}\n"                                      \
                 : __VA_ARGS__                                                                                  \
                 : "r"(a[4 * k]), "r"(a[4 * k + 1]), "r"(a[4 * k + 2]), "r"(a[4 * k + 3]), "l"(b))

namespace fastvid::conv {

template <bool BF16>
__device__ __forceinline__ void wgmma(float (&d)[48], const uint32_t (&a)[16], int k, uint64_t b) {
    if constexpr (BF16) {
        FASTVID_WGMMA(96, "bf16", FASTVID_NAMES48, "%48, %49, %50, %51", "%52", FASTVID_ACC48(d, 0));
    } else {
        FASTVID_WGMMA(96, "f16", FASTVID_NAMES48, "%48, %49, %50, %51", "%52", FASTVID_ACC48(d, 0));
    }
}

template <bool BF16>
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[16], int k, uint64_t b) {
    if constexpr (BF16) {
        FASTVID_WGMMA(128, "bf16", FASTVID_NAMES64, "%64, %65, %66, %67", "%68", FASTVID_ACC48(d, 0),
                      FASTVID_ACC16(d, 48));
    } else {
        FASTVID_WGMMA(128, "f16", FASTVID_NAMES64, "%64, %65, %66, %67", "%68", FASTVID_ACC48(d, 0),
                      FASTVID_ACC16(d, 48));
    }
}

// What a launch reads and writes.
struct Maps {
    CUtensorMap x, past, weights;
    CUtensorMap out[4];  // of a place, or of a half of the channels; the first one also of what is added to
};

template <int N, bool BF16>
class Sm90 : public Words<BF16> {
  public:
    template <typename T, int Count>
    struct Registers {
        T value[Count];
        __device__ __forceinline__ T& at(int, int i) { return value[i]; }
    };
    using Accumulators = Registers<float, N / 2>;

    // memory: address of shared memory, a multiple of 1,024.
    __device__ __forceinline__ Sm90(const Maps& maps, const Conv& s, uint32_t memory)
        : maps_(maps), memory_(memory), pixel_bytes_(pixel_stage_bytes(s)) {}

    // By one thread, before the block meets.
    __device__ __forceinline__ void init() const {
        for (int ring = 0; ring < 2; ++ring) {
            for (int stage = 0; stage < (ring ? weight_stages(N) : kMostPixelStages); ++stage) {
                sm90::init_barrier(full(ring, stage), 1);
                sm90::init_barrier(empty(ring, stage), kConsumers);
            }
        }
        sm90::show_barriers();
    }

    __device__ __forceinline__ uint32_t address(int ring, int stage) const {
        return ring == kPixelRing ? memory_ + stage * pixel_bytes_ : memory_ + kPixelArea + stage * weight_bytes(N);
    }

    __device__ __forceinline__ void wait_empty(int ring, const Ring& at) const {
        sm90::wait(empty(ring, at.stage), at.parity ^ 1);
    }
    __device__ __forceinline__ void wait_full(int ring, const Ring& at) const {
        sm90::wait(full(ring, at.stage), at.parity);
    }
    __device__ __forceinline__ void expect(int ring, const Ring& at, int bytes) const {
        sm90::expect_bytes(full(ring, at.stage), bytes);
    }
    // By every warp of all consumers.
    __device__ __forceinline__ void release(int ring, const Ring& at) const {
        if (threadIdx.x % 32 == 0) sm90::arrive(empty(ring, at.stage));
    }

    __device__ __forceinline__ void load_pixels(const Ring& at, int from_past, int c, int w, int h, int t,
                                                int b) const {
        sm90::load_box(address(kPixelRing, at.stage), from_past ? &maps_.past : &maps_.x, full(kPixelRing, at.stage), c,
                       w, h, t, b);
    }
    __device__ __forceinline__ void load_weights(const Ring& at, int c, int tap, int n) const {
        sm90::load_box(address(kWeightRing, at.stage), &maps_.weights, full(kWeightRing, at.stage), c, tap, n);
    }
    __device__ __forceinline__ void load_panel(const Ring& at, int panel, int group, int n, int w, int h, int t,
                                               int b) const {
        const uint32_t to = address(kPixelRing, at.stage) + panel * kPanelBytes + group * (kGroupPixels * kPanelRow);
        sm90::load_box(to, &maps_.out[0], full(kPixelRing, at.stage), n, w, h, t, b);
    }
    // By one thread of a warpgroup, of what all of it has shown.
    __device__ __forceinline__ void store_box(int which, uint32_t from, int n, int w, int h, int t, int b) const {
        if (threadIdx.x % 128 == 0) sm90::store_box(&maps_.out[which], from, n, w, h, t, b);
    }
    __device__ __forceinline__ void wait_stored() const {
        if (threadIdx.x % 128 == 0) sm90::wait_stores_read();
        __syncwarp();
    }

    template <typename Function>
    __device__ __forceinline__ void each(Function function) const {
        function(static_cast<int>(threadIdx.x % 128));
    }

    template <int Depth, typename Address>
    __device__ __forceinline__ void read_left(Registers<uint32_t, 16>& left, Address address) const {
        const uint32_t from = address(static_cast<int>(threadIdx.x % 128));
        FASTVID_UNROLL
        for (int k = 0; k < Depth; ++k) {
            uint32_t* to = left.value + 4 * k;
            sm90::load_matrices(to[0], to[1], to[2], to[3], from ^ k * kDepth * kBytes);
        }
    }
    template <typename Address>
    __device__ __forceinline__ void read_words(Registers<uint32_t, 4>& words, Address address) const {
        uint32_t (&to)[4] = words.value;
        sm90::load_matrices(to[0], to[1], to[2], to[3], address(static_cast<int>(threadIdx.x % 128)));
    }
    template <typename Address>
    __device__ __forceinline__ void write_words(const Ring&, const Registers<uint32_t, 4>& words,
                                                Address address) const {
        sm90::store_matrices(address(static_cast<int>(threadIdx.x % 128)), words.value);
    }
    // To TMA, and to the warpgroup. Barrier 0 is __syncthreads.
    __device__ __forceinline__ void show_words(int group) const {
        sm90::show_writes();
        sm90::meet(1 + group, 128);
    }

    template <typename T, int Count>
    __device__ __forceinline__ void begin(Registers<T, Count>& registers) const {
        sm90::hold(registers.value);
        sm90::fence_products();
    }
    __device__ __forceinline__ void mma(Accumulators& sums, const Registers<uint32_t, 16>& left, int k,
                                        uint64_t right) const {
        wgmma<BF16>(sums.value, left.value, k, right);
    }
    __device__ __forceinline__ void commit() const { sm90::commit_products(); }
    template <int Pending>
    __device__ __forceinline__ void drain(Accumulators& sums) const {
        sm90::drain_products<Pending>();
        sm90::hold(sums.value);
    }

  private:
    __device__ __forceinline__ uint32_t full(int ring, int stage) const {
        return memory_ + kPixelArea + kWeightArea + (ring * kMostPixelStages + stage) * 16;
    }
    __device__ __forceinline__ uint32_t empty(int ring, int stage) const { return full(ring, stage) + 8; }

    const Maps& maps_;
    uint32_t memory_;
    int pixel_bytes_;
};

}  // namespace fastvid::conv
