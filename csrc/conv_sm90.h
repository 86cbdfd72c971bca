// What the convolution asks of sm_90a: TMA loads, mbarriers and wgmma, as conv_kernel.h names them.
//
// Registers are not moved between warpgroups (setmaxnreg): 288 threads leave up to 224 each to a block that has a
// multiprocessor to itself, and 112 to one of two, which is enough for 96 and 64 accumulators.
#pragma once

#include <cuda.h>

#include "conv_kernel.h"
#include "conv_words.h"

#define FASTVID_ACC8(d, i)                                                                                      \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FASTVID_ACC16(d, i) FASTVID_ACC8(d, i), FASTVID_ACC8(d, i + 8)
#define FASTVID_ACC48(d, i) FASTVID_ACC16(d, i), FASTVID_ACC16(d, i + 16), FASTVID_ACC16(d, i + 32)

#define FASTVID_NAMES48                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTVID_NAMES64                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTVID_NAMES96                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

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
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(full(stage)), "r"(1) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty(stage)), "r"(kConsumers) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }

    __device__ __forceinline__ uint32_t address(int stage) const { return ring_ + stage * stage_bytes(N); }

    __device__ __forceinline__ void wait_empty(int stage, uint32_t parity) const { wait(empty(stage), parity); }
    __device__ __forceinline__ void wait_full(int stage, uint32_t parity) const { wait(full(stage), parity); }

    __device__ __forceinline__ void expect(int stage, int bytes) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full(stage)), "r"(bytes)
                     : "memory");
    }
    // By every warp of both consumers.
    __device__ __forceinline__ void release(int stage) const {
        if (threadIdx.x % 32 == 0) {
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty(stage)) : "memory");
        }
    }

    __device__ __forceinline__ void load_pixels(int stage, int from_past, int c, int w, int h, int t, int b) const {
        const CUtensorMap* map = from_past ? past_ : x_;
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
            "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(address(stage)),
            "l"(map), "r"(full(stage)), "r"(c), "r"(w), "r"(h), "r"(t), "r"(b)
            : "memory");
    }
    __device__ __forceinline__ void load_weights(int stage, int c, int tap, int n) const {
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
            "[%1, {%3, %4, %5}], [%2];" ::"r"(address(stage) + kPixelBytes),
            "l"(weights_), "r"(full(stage)), "r"(c), "r"(tap), "r"(n)
            : "memory");
    }

    __device__ __forceinline__ void begin(Accumulators& acc) const {
        hold(acc);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    }
    __device__ __forceinline__ void mma(Accumulators& acc, uint64_t a, uint64_t b) const {
        wgmma<N, BF16>(acc.value, a, b);
    }
    __device__ __forceinline__ void commit(Accumulators&) const {
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }
    template <int Pending>
    __device__ __forceinline__ void drain(Accumulators& acc) const {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
        if (Pending == 0) hold(acc);
    }

  private:
    __device__ __forceinline__ uint32_t full(int stage) const { return ring_ + stages(N) * stage_bytes(N) + stage * 8; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(stages(N) + stage); }

    __device__ __forceinline__ static void wait(uint32_t barrier, uint32_t parity) {
        uint32_t ended;
        do {
            asm volatile(
                "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                : "=r"(ended)
                : "r"(barrier), "r"(parity)
                : "memory");
        } while (!ended);
    }

    // Keeps the compiler from moving accumulators across products that are still running.
    __device__ __forceinline__ static void hold(Accumulators& acc) {
        FASTVID_UNROLL
        for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(acc.value[i])::"memory");
    }

    const CUtensorMap *x_, *past_, *weights_;
    uint32_t ring_;
};

}  // namespace fastvid::conv
