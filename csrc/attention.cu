// Attention on sm_90a, dense and block-sparse: attention.h has the formula, attention_kernel.h the block,
// attention_sm90.h the instructions. Not verified or measured on a GPU yet.
//
// Why these sizes. At head dimension 128 a step of 64 queries and 176 keys leaves a thread 88 scores, 44 registers of
// weights and 64 sums: 196 of the 240 registers that the producer leaves to it (227 are used). A multiprocessor then
// holds 128 queries (32 KiB) and two stages of 176 keys and values (88 KiB each). Lists are cut into 128 keys, so that
// less of a step is lost at their ends: three stages of 64 KiB; with 64 columns four stages fit. 128 queries and 128
// keys take the matrix units 2 * 128^3 / 2,048 = 2,048 clocks (dense, 16 bits), half of that with 64 columns, and their
// 16,384 exponentials 1,024 of the special function units, 16 a clock: so two groups take turns, and one makes its
// softmax beside the other's products. What a step costs beside them (maxima of four threads, smaller sums, barriers)
// comes 1.4 times less often with 176. The grid is as large as the device; works are dealt out in turn.
#include "attention_call.h"
#include "attention_launch.h"
#include "attention_pair.h"
#include "attention_sm90.h"
#include "fastvid.h"

namespace fastvid {
namespace attention {
namespace {

template <int D, int Keys, bool BF16>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                     const __grid_constant__ CUtensorMap v, const Attention s, uint16_t* out, float* lse) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    run_block<Half<D, Keys>, Sm90<D, Keys, BF16>>(&q, &k, &v, s, out, lse);
#else
    __trap();  // never launched: the launcher asks which device it is
#endif
}

template <int D, int Keys>
int launch(const Call& call, const Lists& lists, float scale, const Tensors& at, DType dtype, int device,
           void* stream) {
    const bool bf16 = dtype == DType::kBFloat16;
    const auto kernel = bf16 ? attention_kernel<D, Keys, true> : attention_kernel<D, Keys, false>;
    const auto type = bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const Map maps[3] = {map_of(call, at.q, call.queries, call.q_strides, kQueries),
                         map_of(call, at.k, call.keys, call.k_strides, Keys),
                         map_of(call, at.v, call.keys, call.v_strides, Keys)};
    return on_device(device, [&] {
        return launch_blocks(kernel, Half<D, Keys>::room(), maps, type, attention_of(call, lists, scale), at.out,
                             at.lse, device, static_cast<cudaStream_t>(stream));
    });
}

}  // namespace
}  // namespace attention

int attend(const attention::Call& call, const attention::Lists& lists, float scale, const void* q, const void* k,
           const void* v, void* out, float* lse, DType dtype, int device, void* stream) {
    using namespace attention;
    if (compute_capability(device) != 90) return cudaErrorNoKernelImageForDevice;
    if (dtype == DType::kFloat32) return cudaErrorInvalidValue;
    const Tensors at = {q, k, v, out, lse};
    if (paired(call)) return attend_pairs(call, scale, at, dtype == DType::kBFloat16, device, stream);
    const int keys = keys_of_step(call);
    if (keys == kWideKeys) return launch<128, kWideKeys>(call, lists, scale, at, dtype, device, stream);
    if (call.head_dim == 128) return launch<128, kKeys>(call, lists, scale, at, dtype, device, stream);
    return launch<64, kKeys>(call, lists, scale, at, dtype, device, stream);
}

}  // namespace fastvid
