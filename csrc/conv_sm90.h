// What the convolution asks of sm_90a: TMA loads, mbarriers and wgmma, as conv_kernel.h names them.
//
// Registers are not moved between warpgroups (setmaxnreg): 288 threads leave up to 224 each to a block that has a
// multiprocessor to itself, and 112 to one of two, which is enough for 96 and 64 accumulators.
#pragma once

#include "conv_kernel.h"
#include "sm90.h"
#include "words.h"

// D[64, N] += A[64, 16] B[N, 16]^T, both in shared memory with rows along K; the flags are scale of D, signs of A and
// B, and that neither is transposed.
#define FASTVID_WGMMA(N, TYPE, NAMES, A, B, ...)                                                                \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " {" NAMES "}, " A ", " B ", p, 1, 1, 0, 0;\n}\n"                                     \
                 : __VA_ARGS__                                                                                  \
                 : "l"(a), "l"(b))

namespace fastvid::conv {

template <int N, bool BF16>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
    if constexpr (N == 96 && BF16) {
        FASTVID_WGMMA(96, "bf16", FASTVID_NAMES48, "%48", "%49", FASTVID_ACC48(d, 0));
    } else if constexpr (N == 96 && !BF16) {
        FASTVID_WGMMA(96, "f16", FASTVID_NAMES48, "%48", "%49", FASTVID_ACC48(d, 0));
    } else if constexpr (N == 128 && BF16) {
        FASTVID_WGMMA(128, "bf16", FASTVID_NAMES64, "%64", "%65", FASTVID_ACC48(d, 0), FASTVID_ACC16(d, 48));
    } else if constexpr (N == 128 && !BF16) {
        FASTVID_WGMMA(128, "f16", FASTVID_NAMES64, "%64", "%65", FASTVID_ACC48(d, 0), FASTVID_ACC16(d, 48));
    } else if constexpr (N == 192 && BF16) {
        FASTVID_WGMMA(192, "bf16", FASTVID_NAMES96, "%96", "%97", FASTVID_ACC48(d, 0), FASTVID_ACC48(d, 48));
    } else if constexpr (N == 192 && !BF16) {
        FASTVID_WGMMA(192, "f16", FASTVID_NAMES96, "%96", "%97", FASTVID_ACC48(d, 0), FASTVID_ACC48(d, 48));
    }
}

template <int N, bool BF16>
class Sm90 : public Words<BF16> {
  public:
    struct Accumulators {
        float value[N / 2];
        __device__ __forceinline__ float at(int, int i) const { return value[i]; }
    };

    // ring: address of the stages in shared memory, a multiple of 1,024; behind them two barriers for each.
    __device__ __forceinline__ Sm90(const CUtensorMap* x, const CUtensorMap* past, const CUtensorMap* weights,
                                    uint32_t ring)
        : x_(x), past_(past), weights_(weights), ring_(ring) {}

    // By one thread, before the block meets.
    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < stages(N); ++stage) {
            sm90::init_barrier(full(stage), 1);
            sm90::init_barrier(empty(stage), kConsumers);
        }
        sm90::show_barriers();
    }

    __device__ __forceinline__ uint32_t address(int stage) const { return ring_ + stage * stage_bytes(N); }

    __device__ __forceinline__ void wait_empty(int stage, uint32_t parity) const { sm90::wait(empty(stage), parity); }
    __device__ __forceinline__ void wait_full(int stage, uint32_t parity) const { sm90::wait(full(stage), parity); }

    __device__ __forceinline__ void expect(int stage, int bytes) const { sm90::expect_bytes(full(stage), bytes); }
    // By every warp of both consumers.
    __device__ __forceinline__ void release(int stage) const {
        if (threadIdx.x % 32 == 0) sm90::arrive(empty(stage));
    }

    __device__ __forceinline__ void load_pixels(int stage, int from_past, int c, int w, int h, int t, int b) const {
        sm90::load_box(address(stage), from_past ? past_ : x_, full(stage), c, w, h, t, b);
    }
    __device__ __forceinline__ void load_weights(int stage, int c, int tap, int n) const {
        sm90::load_box(address(stage) + kPixelBytes, weights_, full(stage), c, tap, n);
    }

    __device__ __forceinline__ void begin(Accumulators& acc) const {
        sm90::hold(acc.value);
        sm90::fence_products();
    }
    __device__ __forceinline__ void mma(Accumulators& acc, uint64_t a, uint64_t b) const {
        wgmma<N, BF16>(acc.value, a, b);
    }
    __device__ __forceinline__ void commit(Accumulators&) const { sm90::commit_products(); }
    template <int Pending>
    __device__ __forceinline__ void drain(Accumulators& acc) const {
        sm90::drain_products<Pending>();
        if (Pending == 0) sm90::hold(acc.value);
    }

  private:
    __device__ __forceinline__ uint32_t full(int stage) const { return ring_ + stages(N) * stage_bytes(N) + stage * 8; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(stages(N) + stage); }

    const CUtensorMap *x_, *past_, *weights_;
    uint32_t ring_;
};

}  // namespace fastvid::conv
