// Attention on sm_90a, dense and block-sparse: attention.h has the formula, attention_kernel.h the block,
// attention_sm90.h the instructions. Not verified or measured on a GPU yet.
//
// Why these sizes. A step of 64 queries and 128 keys leaves a thread 64 scores, 32 registers of weights and, at head
// dimension 128, 64 sums: 160 of the 240 registers that the producer leaves to it. A multiprocessor then holds 128
// queries (32 KiB) and three stages of 128 keys and values (64 KiB each); with 64 columns four stages fit. 128 queries
// and keys take the matrix units 2 * 128^3 / 2,048 = 2,048 clocks (dense, 16 bits), half of that with 64 columns, and
// their 16,384 exponentials 1,024 of the special function units, 16 a clock: so two groups take turns, and one makes
// its softmax beside the other's products. The grid is as large as the device; works are dealt out in turn.
#include "attention_call.h"
#include "attention_launch.h"
#include "attention_sm90.h"
#include "fastvid.h"

namespace fastvid {
namespace attention {
namespace {

template <int D, bool BF16>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                     const __grid_constant__ CUtensorMap v, const Attention s, uint16_t* out, float* lse) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    run_block<Half<D>, Sm90<D, BF16>>(&q, &k, &v, s, out, lse);
#else
    __trap();  // never launched: the launcher asks which device it is
#endif
}

}  // namespace
}  // namespace attention

int attend(const attention::Call& call, const attention::Lists& lists, float scale, const void* q, const void* k,
           const void* v, void* out, float* lse, DType dtype, int device, void* stream) {
    using namespace attention;
    if (compute_capability(device) != 90) return cudaErrorNoKernelImageForDevice;
    if (dtype == DType::kFloat32) return cudaErrorInvalidValue;
    const bool bf16 = dtype == DType::kBFloat16, wide = call.head_dim == 128;
    const auto kernel = wide ? (bf16 ? attention_kernel<128, true> : attention_kernel<128, false>)
                             : (bf16 ? attention_kernel<64, true> : attention_kernel<64, false>);
    const auto type = bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const Map maps[3] = {map_of(call, q, call.queries, call.q_strides), map_of(call, k, call.keys, call.k_strides),
                         map_of(call, v, call.keys, call.v_strides)};
    return on_device(device, [&] {
        return launch_blocks(kernel, wide ? Half<128>::kTile : Half<64>::kTile, maps, type,
                             attention_of(call, lists, scale), out, lse, device, static_cast<cudaStream_t>(stream));
    });
}

}  // namespace fastvid
