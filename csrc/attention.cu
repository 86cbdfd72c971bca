// Attention on sm_90a, dense and block-sparse: attention.h has the formula, attention_kernel.h the block,
// attention_sm90.h the instructions. Not verified or measured on a GPU yet.
//
// Why these sizes. A step of 64 queries and 128 keys leaves a thread 64 scores, 32 registers of weights and, at head
// dimension 128, 64 sums: 160 of the 232 registers that the producer leaves to it. A multiprocessor then holds 128
// queries (32 KiB) and three stages of 128 keys and values (64 KiB each); with 64 columns four stages fit. 128 queries
// and keys take the matrix units 2 * 128^3 / 2,048 = 2,048 clocks (dense, 16 bits), half of that with 64 columns, and
// their 16,384 exponentials 1,024 of the special function units, 16 a clock: so two groups take turns, and one makes
// its softmax beside the other's products. The grid is as large as the device; works are dealt out in turn.
#include <cuda_runtime.h>

#include "attention_call.h"
#include "attention_sm90.h"
#include "fastvid.h"
#include "tensor_map.h"

namespace fastvid {
namespace attention {
namespace {

template <int D, bool BF16>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                     const __grid_constant__ CUtensorMap v, const Attention s, uint16_t* out, float* lse) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    if (start % 1024) __trap();  // the swizzle counts from there
    Sm90<D, BF16> hw(&q, &k, &v, start);
    if (threadIdx.x == 0) hw.init();
    __syncthreads();
    const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // the same for a warp, and known to be
    if (group == kGroups) {
        sm90::keep_registers<kProducerRegisters>();
        if (threadIdx.x == kGroups * 128) produce<Half<D>>(hw, s, blockIdx.x, gridDim.x);
    } else {
        sm90::take_registers<kConsumerRegisters>();
        consume<Half<D>>(hw, s, group, blockIdx.x, gridDim.x, out, lse);
    }
#else
    __trap();  // never launched: the launcher asks which device it is
#endif
}

struct Pointers {
    const void *q, *k, *v;
    void* out;
    float* lse;
};

template <int D, bool BF16>
cudaError_t launch(const Call& call, const Attention& s, const Pointers& at, int device, cudaStream_t stream) {
    int processors = 0;
    CUtensorMap q, k, v;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = encode(&q, map_of(call, at.q, call.queries, call.q_strides), BF16);
    if (error == cudaSuccess) error = encode(&k, map_of(call, at.k, call.keys, call.k_strides), BF16);
    if (error == cudaSuccess) error = encode(&v, map_of(call, at.v, call.keys, call.v_strides), BF16);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(attention_kernel<D, BF16>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     smem_bytes(Half<D>::kTile));
    }
    if (error != cudaSuccess) return error;
    const int64_t grid = works(s) < processors ? works(s) : processors;
    attention_kernel<D, BF16><<<static_cast<unsigned>(grid), kThreads, smem_bytes(Half<D>::kTile), stream>>>(
        q, k, v, s, static_cast<uint16_t*>(at.out), at.lse);
    return cudaGetLastError();
}

}  // namespace
}  // namespace attention

int attend(const attention::Call& call, const attention::Lists& lists, float scale, const void* q, const void* k,
           const void* v, void* out, float* lse, DType dtype, int device, void* stream) {
    if (compute_capability(device) != 90) return cudaErrorNoKernelImageForDevice;
    if (dtype == DType::kFloat32) return cudaErrorInvalidValue;
    int before = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    const bool bf16 = dtype == DType::kBFloat16, wide = call.head_dim == 128;
    const auto launch = wide ? (bf16 ? attention::launch<128, true> : attention::launch<128, false>)
                             : (bf16 ? attention::launch<64, true> : attention::launch<64, false>);
    const auto s = attention::attention_of(call, lists, scale);
    error = launch(call, s, {q, k, v, out, lse}, device, static_cast<cudaStream_t>(stream));
    cudaSetDevice(before);
    return error;
}

}  // namespace fastvid
