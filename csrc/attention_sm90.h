// What attention asks of sm_90a, as attention_kernel.h names it.
#pragma once

#include "attention_half.h"
#include "sm90.h"
#include "words.h"

// D[64, N] (+)= A B. A and B in shared memory with rows along K: queries and keys. The flags are the signs of A and B,
// and that neither is transposed.
#define FASTVID_SCORES(N, TYPE, NAMES, A, B, P, ...)                                                                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " {" NAMES "}, " A ", " B ", p, 1, 1, 0, 0;\n}\n"                                         \
                 : __VA_ARGS__                                                                                      \
                 : "l"(a), "l"(b), "n"(Add ? 1 : 0))

// A in registers, B in shared memory and transposed, its rows along N: weights and values.
#define FASTVID_VALUES(N, TYPE, NAMES, A, B, ...)                                                               \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " {" NAMES "}, {" A "}, " B ", p, 1, 1, 1;\n}\n"                                      \
                 : __VA_ARGS__                                                                                  \
                 : "r"(a[4 * step]), "r"(a[4 * step + 1]), "r"(a[4 * step + 2]), "r"(a[4 * step + 3]), "l"(b))

namespace fastvid::attention {

template <bool BF16, bool Add>
__device__ __forceinline__ void multiply_keys(float (&d)[64], uint64_t a, uint64_t b) {
    if constexpr (BF16) {
        FASTVID_SCORES(128, "bf16", FASTVID_NAMES64, "%64", "%65", "%66", FASTVID_ACC32(d, 0), FASTVID_ACC32(d, 32));
    } else {
        FASTVID_SCORES(128, "f16", FASTVID_NAMES64, "%64", "%65", "%66", FASTVID_ACC32(d, 0), FASTVID_ACC32(d, 32));
    }
}
template <bool BF16, bool Add>
__device__ __forceinline__ void multiply_keys(float (&d)[88], uint64_t a, uint64_t b) {
    if constexpr (BF16) {
        FASTVID_SCORES(176, "bf16", FASTVID_NAMES88, "%88", "%89", "%90", FASTVID_ACC48(d, 0), FASTVID_ACC32(d, 48),
                       FASTVID_ACC8(d, 80));
    } else {
        FASTVID_SCORES(176, "f16", FASTVID_NAMES88, "%88", "%89", "%90", FASTVID_ACC48(d, 0), FASTVID_ACC32(d, 48),
                       FASTVID_ACC8(d, 80));
    }
}

template <bool BF16, int Count>
__device__ __forceinline__ void multiply_values(float (&d)[64], const uint32_t (&a)[Count], int step, uint64_t b) {
    if constexpr (BF16) {
        FASTVID_VALUES(128, "bf16", FASTVID_NAMES64, "%64, %65, %66, %67", "%68", FASTVID_ACC32(d, 0),
                       FASTVID_ACC32(d, 32));
    } else {
        FASTVID_VALUES(128, "f16", FASTVID_NAMES64, "%64, %65, %66, %67", "%68", FASTVID_ACC32(d, 0),
                       FASTVID_ACC32(d, 32));
    }
}

template <bool BF16, int Count>
__device__ __forceinline__ void multiply_values(float (&d)[32], const uint32_t (&a)[Count], int step, uint64_t b) {
    if constexpr (BF16) {
        FASTVID_VALUES(64, "bf16", FASTVID_NAMES32, "%32, %33, %34, %35", "%36", FASTVID_ACC32(d, 0));
    } else {
        FASTVID_VALUES(64, "f16", FASTVID_NAMES32, "%32, %33, %34, %35", "%36", FASTVID_ACC32(d, 0));
    }
}

// What does not depend on the values: barriers, loads, turns, rows.
template <typename Form>
class Warpgroups {
  public:
    template <typename T, int Count>
    struct Registers {
        T value[Count];
        __device__ __forceinline__ T& at(int, int i) { return value[i]; }
    };
    using Rows = Registers<float, 2>;

    // memory: address of shared memory, a multiple of 1,024.
    __device__ __forceinline__ Warpgroups(const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v,
                                          uint32_t memory)
        : maps_{q, k, v}, memory_(memory) {}

    // By one thread, before the block meets.
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < barriers(Form::room()); ++i) sm90::init_barrier(barrier(i), arrivals(i, Form::kBlocks));
        sm90::show_barriers();
    }

    __device__ __forceinline__ uint32_t address(int at) const { return memory_ + at; }

    __device__ __forceinline__ void wait(int i, uint32_t parity) const { sm90::wait(barrier(i), parity); }
    // Passes at once. But its branch ends a basic block, and ptxas (13.0) moves a wait for products up to the top of
    // one: without it the exponentials of a step come after the products that they should run beside.
    __device__ __forceinline__ void again(int i, uint32_t parity) const { wait(i, parity); }
    __device__ __forceinline__ void expect(int i, int bytes) const { sm90::expect_bytes(barrier(i), bytes); }
    __device__ __forceinline__ void arrive(int i) const {
        if (threadIdx.x % 32 == 0) sm90::arrive(barrier(i));
    }
    __device__ __forceinline__ void load(Tensor tensor, int at, int i, int column, int row, int head, int batch) const {
        sm90::load_box(address(at), maps_[tensor], barrier(i), column, row, head, batch);
    }

    // Lane r tells block r of the cluster that this warp has read a stage.
    __device__ __forceinline__ void release(int i) const {
        if constexpr (Form::kBlocks == 1) {
            arrive(i);
        } else if (threadIdx.x % 32 < Form::kBlocks) {
            sm90::arrive_at(barrier(i), threadIdx.x % 32);
        }
    }
    __device__ __forceinline__ int rank() const { return sm90::cluster_rank(); }
    __device__ __forceinline__ void share(Tensor tensor, int at, int i, int column, int row, int head,
                                          int batch) const {
        constexpr uint16_t kAll = (1 << Form::kBlocks) - 1;
        sm90::share_box(address(at), maps_[tensor], barrier(i), kAll, column, row, head, batch);
    }

    // The number of a work, by one thread and to all of a warp, before it arrives at the barrier of empty ones.
    __device__ __forceinline__ void tell(int i, int number) const {
        sm90::store(memory_ + Form::room().number_at(), number);
        sm90::arrive(barrier(i));
    }
    __device__ __forceinline__ int told() const {
        const int number = sm90::load(memory_ + Form::room().number_at());
        __syncwarp();
        return number;
    }
    __device__ __forceinline__ int next(int32_t* counter) const { return atomicAdd(counter, 1); }

    // Barrier 0 is __syncthreads.
    __device__ __forceinline__ void turn(int group) const { sm90::meet(1 + group, kGroups * 128); }
    __device__ __forceinline__ void pass(int group) const { sm90::pass(1 + (group ^ 1), kGroups * 128); }

    template <typename Function>
    __device__ __forceinline__ void each(Function function) const {
        function(static_cast<int>(threadIdx.x % 128));
    }
    __device__ __forceinline__ void quad_max(Rows& rows) const {
        FASTVID_UNROLL
        for (int half = 0; half < 2; ++half) {
            FASTVID_UNROLL
            for (int lane = 1; lane < 4; lane *= 2) {
                rows.value[half] = max(rows.value[half], __shfl_xor_sync(0xFFFFFFFFu, rows.value[half], lane));
            }
        }
    }
    __device__ __forceinline__ void quad_sum(Rows& rows) const {
        FASTVID_UNROLL
        for (int half = 0; half < 2; ++half) {
            FASTVID_UNROLL
            for (int lane = 1; lane < 4; lane *= 2) {
                rows.value[half] += __shfl_xor_sync(0xFFFFFFFFu, rows.value[half], lane);
            }
        }
    }

    template <typename T, int Count>
    __device__ __forceinline__ void begin(Registers<T, Count>& registers) const {
        sm90::hold(registers.value);
        sm90::fence_products();
    }
    __device__ __forceinline__ void commit() const { sm90::commit_products(); }
    template <int Pending, typename T, int Count>
    __device__ __forceinline__ void drain(Registers<T, Count>& made) const {
        sm90::drain_products<Pending>();
        sm90::hold(made.value);
    }

    __device__ __forceinline__ float max(float a, float b) const { return fmaxf(a, b); }
    __device__ __forceinline__ float exp2(float x) const {
        float made;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
        return made;
    }
    __device__ __forceinline__ float log2(float x) const { return log2f(x); }
    __device__ __forceinline__ float inverse(float x) const {
        float made;  // a division would be a subroutine, for numbers that no sum of weights is
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
        return made;
    }

  private:
    __device__ __forceinline__ uint32_t barrier(int i) const { return memory_ + Form::room().barriers_at() + i * 8; }

    const CUtensorMap* maps_[3];
    uint32_t memory_;
};

template <int D, int Keys, bool BF16, int Blocks = 1>
class Sm90 : public Warpgroups<Half<D, Keys, Blocks>>, public Words<BF16> {
    using Base = Warpgroups<Half<D, Keys, Blocks>>;

  public:
    using Base::Base;
    using Scores = typename Base::template Registers<float, Keys / 2>;
    using Output = typename Base::template Registers<float, D / 2>;
    using Weights = typename Base::template Registers<uint32_t, Keys / 4>;

    template <bool Add>
    __device__ __forceinline__ void scores(Scores& to, uint64_t queries, uint64_t keys) const {
        multiply_keys<BF16, Add>(to.value, queries, keys);
    }
    template <bool Add>
    __device__ __forceinline__ void values(Output& to, Weights& weights, int step, uint64_t values) const {
        static_assert(Add, "the output is made in place");
        multiply_values<BF16>(to.value, weights.value, step, values);
    }
};

// All that a block does. group: the same for a warp, and known to be.
template <typename Form, typename Hardware>
__device__ __forceinline__ void run_block(const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v,
                                          const Attention& s, uint16_t* out, float* lse) {
    static_assert(fit(Form::registers()), "registers");
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    if (start % 1024) __trap();  // the swizzle counts from there
    Hardware hw(q, k, v, start);
    if (threadIdx.x == 0) hw.init();
    if constexpr (Form::kBlocks == 1) {
        __syncthreads();
    } else {
        sm90::meet_cluster();  // before another block's bytes or warps arrive at these barriers
    }
    const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
    if (group == kGroups) {
        sm90::keep_registers<Form::registers().producer>();
        if (threadIdx.x == kGroups * 128) produce<Form>(hw, s, blockIdx.x, gridDim.x);
    } else {
        sm90::take_registers<Form::registers().consumer>();
        consume<Form>(hw, s, group, blockIdx.x, gridDim.x, out, lse);
    }
    if constexpr (Form::kBlocks > 1) sm90::meet_cluster();  // others still tell this block what they have read
}

}  // namespace fastvid::attention
