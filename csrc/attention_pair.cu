// Dense attention on sm_90a by pairs of blocks, where the tiles of queries are even: two blocks of a cluster,
// neighbours among the queries of a head, each load half of every step's keys and values into both. Everything else is
// as in attention.cu. Not verified or measured on a GPU yet.
//
// Why. A block of 128 queries reads 64 KiB of keys and values in the 2,048 clocks that the matrix units take for them
// at best: 32 bytes a clock for each multiprocessor, of which each block of a pair asks the L2 cache for half.
#include "attention_launch.h"
#include "attention_pair.h"
#include "attention_sm90.h"

namespace fastvid {
namespace attention {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FASTVID_PAIR
#else
#define FASTVID_PAIR __cluster_dims__(kPair, 1, 1)
#endif

template <bool BF16>
__global__ void FASTVID_PAIR __launch_bounds__(kThreads, 1)
    attention_pair_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                          const __grid_constant__ CUtensorMap v, const Attention s, uint16_t* out, float* lse) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    run_block<Half<128, kWideKeys, kPair>, Sm90<128, kWideKeys, BF16, kPair>>(&q, &k, &v, s, out, lse);
#else
    __trap();  // never launched: the launcher asks which device it is
#endif
}

}  // namespace

int attend_pairs(const Call& call, float scale, const Tensors& at, bool bf16, int device, void* stream) {
    const auto kernel = bf16 ? attention_pair_kernel<true> : attention_pair_kernel<false>;
    const auto type = bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const Map maps[3] = {map_of(call, at.q, call.queries, call.q_strides, kQueries),
                         map_of(call, at.k, call.keys, call.k_strides, kWideKeys / kPair),
                         map_of(call, at.v, call.keys, call.v_strides, kWideKeys / kPair)};
    return on_device(device, [&] {
        return launch_blocks<kPair>(kernel, Half<128, kWideKeys, kPair>::room(), maps, type,
                                    attention_of(call, {}, scale), at.out, at.lse, device,
                                    static_cast<cudaStream_t>(stream));
    });
}

}  // namespace attention
}  // namespace fastvid
