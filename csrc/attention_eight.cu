// Attention of 8-bit values on sm_90a, dense and block-sparse: attention_eight.h has the formula, attention_kernel.h
// the block, quantize.h what makes the values. Not verified or measured on a GPU yet.
//
// Why these sizes. They are those of attention.cu: at head dimension 128, 128 queries and keys take the matrix units
// 1,024 clocks at twice the rate of 16 bits, and their exponentials as many, so the two groups that take turns fill
// both. A thread holds 64 scores, 16 registers of weights, 64 sums and 64 products of a step: 208 of its 240. Each
// score takes some 5 1/2 instructions, with integers 6 1/2 (I2FP, which is no work of the special function units): 704
// and 832 of the 1,024 that the four schedulers have in that time.
#include "attention_eight_call.h"
#include "attention_eight_sm90.h"
#include "attention_launch.h"
#include "fastvid.h"

namespace fastvid {
namespace attention {
namespace {

template <int D, bool Int8, bool BF16>
__global__ void __launch_bounds__(kThreads, 1)
    attention_eight_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                           const __grid_constant__ CUtensorMap v, const Attention s, uint16_t* out, float* lse) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    run_block<Eight<D>, Sm90Eight<D, Int8, BF16>>(&q, &k, &v, s, out, lse);
#else
    __trap();  // never launched: the launcher asks which device it is
#endif
}

template <int D>
auto pick(bool int8, bool bf16) {
    return int8 ? (bf16 ? attention_eight_kernel<D, true, true> : attention_eight_kernel<D, true, false>)
                : (bf16 ? attention_eight_kernel<D, false, true> : attention_eight_kernel<D, false, false>);
}

}  // namespace
}  // namespace attention

int attend_eight(const attention::Call& call, const attention::Lists& lists, const attention::Eights& at, float scale,
                 bool int8, void* out, float* lse, DType dtype, int device, void* stream) {
    using namespace attention;
    if (compute_capability(device) != 90) return cudaErrorNoKernelImageForDevice;
    if (dtype == DType::kFloat32) return cudaErrorInvalidValue;
    const bool bf16 = dtype == DType::kBFloat16, wide = call.head_dim == 128;
    const auto kernel = wide ? pick<128>(int8, bf16) : pick<64>(int8, bf16);
    const Map maps[3] = {map_of_queries(call, at), map_of_keys(call, at), map_of_values(call, at)};
    return on_device(device, [&] {
        return launch_blocks(kernel, wide ? Eight<128>::room() : Eight<64>::room(), maps, CU_TENSOR_MAP_DATA_TYPE_UINT8,
                             attention_of(call, lists, at.scales, scale), out, lse, device,
                             static_cast<cudaStream_t>(stream));
    });
}

}  // namespace fastvid
