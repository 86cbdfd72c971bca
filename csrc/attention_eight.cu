// Attention of 8-bit values on sm_90a, dense and block-sparse: attention_eight.h has the formula, attention_kernel.h
// the block, quantize.h what makes the values. Not verified or measured on a GPU yet.
//
// Why these sizes. They are those of attention.cu: at head dimension 128, 128 queries and keys take the matrix units
// 1,024 clocks at twice the rate of 16 bits, and their exponentials as many, so the two groups that take turns fill
// both. A thread holds 64 scores, 16 registers of weights, 64 sums and 64 products of a step: 208 of its 232.
#include <cuda_runtime.h>

#include "attention_eight_call.h"
#include "attention_eight_sm90.h"
#include "fastvid.h"
#include "tensor_map.h"

namespace fastvid {
namespace attention {
namespace {

template <int D, bool Int8, bool BF16>
__global__ void __launch_bounds__(kThreads, 1)
    attention_eight_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                           const __grid_constant__ CUtensorMap v, const Attention s, uint16_t* out, float* lse) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    if (start % 1024) __trap();  // the swizzle counts from there
    Sm90Eight<D, Int8, BF16> hw(&q, &k, &v, start);
    if (threadIdx.x == 0) hw.init();
    __syncthreads();
    const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // the same for a warp, and known to be
    if (group == kGroups) {
        sm90::keep_registers<kProducerRegisters>();
        if (threadIdx.x == kGroups * 128) produce<Eight<D>>(hw, s, blockIdx.x, gridDim.x);
    } else {
        sm90::take_registers<kConsumerRegisters>();
        consume<Eight<D>>(hw, s, group, blockIdx.x, gridDim.x, out, lse);
    }
#else
    __trap();  // never launched: the launcher asks which device it is
#endif
}

template <int D, bool Int8, bool BF16>
cudaError_t launch(const Call& call, const Attention& s, const Eights& at, void* out, float* lse, int device,
                   cudaStream_t stream) {
    constexpr auto kernel = attention_eight_kernel<D, Int8, BF16>;
    constexpr int kBytesOfSmem = smem_bytes(Eight<D>::kTile);
    int processors = 0;
    CUtensorMap q, k, v;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = encode(&q, map_of_queries(call, at), CU_TENSOR_MAP_DATA_TYPE_UINT8);
    if (error == cudaSuccess) error = encode(&k, map_of_keys(call, at), CU_TENSOR_MAP_DATA_TYPE_UINT8);
    if (error == cudaSuccess) error = encode(&v, map_of_values(call, at), CU_TENSOR_MAP_DATA_TYPE_UINT8);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytesOfSmem);
    }
    if (error != cudaSuccess) return error;
    const int64_t grid = works(s) < processors ? works(s) : processors;
    kernel<<<static_cast<unsigned>(grid), kThreads, kBytesOfSmem, stream>>>(q, k, v, s, static_cast<uint16_t*>(out),
                                                                            lse);
    return cudaGetLastError();
}

template <int D, bool Int8>
auto pick(bool bf16) {
    return bf16 ? launch<D, Int8, true> : launch<D, Int8, false>;
}

}  // namespace
}  // namespace attention

int attend_eight(const attention::Call& call, const attention::Lists& lists, const attention::Eights& at, float scale,
                 bool int8, void* out, float* lse, DType dtype, int device, void* stream) {
    if (compute_capability(device) != 90) return cudaErrorNoKernelImageForDevice;
    if (dtype == DType::kFloat32) return cudaErrorInvalidValue;
    int before = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    const bool bf16 = dtype == DType::kBFloat16;
    const auto launch = call.head_dim == 128
                            ? (int8 ? attention::pick<128, true>(bf16) : attention::pick<128, false>(bf16))
                            : (int8 ? attention::pick<64, true>(bf16) : attention::pick<64, false>(bf16));
    const auto s = attention::attention_of(call, lists, at.scales, scale);
    error = launch(call, s, at, out, lse, device, static_cast<cudaStream_t>(stream));
    cudaSetDevice(before);
    return error;
}

}  // namespace fastvid
