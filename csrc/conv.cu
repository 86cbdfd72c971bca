// The VAEs' convolutions on sm_90a: an implicit matrix product with TMA and wgmma; conv.h has the formula,
// conv_kernel.h the block, conv_sm90.h the instructions.
//
// Why RMS norm and SiLU are a pass of their own (vae_norm.cu), not part of the load. A step of 128 pixels x 64 channels
// against N channels takes the matrix units 128 * 64 * N / 2,048 clocks (dense, 16 bits): 384 for N = 96, 768 for 192.
// Normalising its 8,192 values takes 2 of the special function unit's operations each (exp, reciprocal), 16 a clock:
// 1,024 clocks, for each of 27 taps anew and again for every tile of channels. So the load would be the limit for all
// channels that there are. The pass moves 4 bytes a value, 4 C / 4.8e12 seconds a pixel on an H200; the product is
// 54 C N / 0.99e15 seconds a pixel: 16 % of it for N = 96, 8 % for 192, 4 % for 384. And it makes the frames that the
// next chunk looks back on, which have to be written anyhow. These are estimates from the data sheet: not measured.
#include <cuda_runtime.h>

#include "conv_call.h"
#include "conv_sm90.h"
#include "fastvid.h"
#include "on_device.h"
#include "tensor_map.h"

namespace fastvid {
namespace conv {
namespace {

template <int N, bool BF16>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(N))
    conv_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap past,
                const __grid_constant__ CUtensorMap weights, const Conv s, const uint16_t* bias, uint16_t* out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    if (ring % 1024) __trap();  // the swizzle counts from there
    Sm90<N, BF16> hw(&x, &past, &weights, ring);
    const Tile tile = tile_of(s, N, blockIdx.x);
    if (threadIdx.x == 0) hw.init();
    __syncthreads();
    if (threadIdx.x >= kConsumers * 32) {
        if (threadIdx.x == kConsumers * 32) produce<N>(hw, s, tile);
        return;
    }
    const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // the same for a warp, and known to be
    typename Sm90<N, BF16>::Accumulators acc = {};
    consume<N>(hw, acc, s, tile, group);
    store<N>(hw, acc, s, tile, group, threadIdx.x % 128, bias, out);
#else
    __trap();  // never launched: the launcher asks which device it is
#endif
}

struct Pointers {
    const void *x, *past, *weight, *bias;
    void* out;
};

template <int N, bool BF16>
cudaError_t launch(const Call& call, const Pointers& at, cudaStream_t stream) {
    const Conv s = conv_of(call);
    const int64_t grid = blocks(s, N);
    if (grid > kMostBlocks) return cudaErrorInvalidConfiguration;
    CUtensorMap x, past, weights;
    cudaError_t error = encode(&x, map_of_pixels(call, s, at.x, call.x[2], call.x_strides), BF16);
    past = x;
    if (error == cudaSuccess && call.past) {
        error = encode(&past, map_of_pixels(call, s, at.past, call.history, call.past_strides), BF16);
    }
    if (error == cudaSuccess) error = encode(&weights, map_of_weights(call, s, at.weight, N), BF16);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(conv_kernel<N, BF16>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes(N));
    }
    if (error != cudaSuccess) return error;
    conv_kernel<N, BF16><<<static_cast<unsigned>(grid), kThreads, smem_bytes(N), stream>>>(
        x, past, weights, s, static_cast<const uint16_t*>(at.bias), static_cast<uint16_t*>(at.out));
    return cudaGetLastError();
}

template <bool BF16>
cudaError_t launch_width(const Call& call, const Pointers& at, cudaStream_t stream) {
    switch (choose_width(static_cast<int>(outputs_of(call)))) {
        case 96:
            return launch<96, BF16>(call, at, stream);
        case 128:
            return launch<128, BF16>(call, at, stream);
        default:
            return launch<192, BF16>(call, at, stream);
    }
}

}  // namespace
}  // namespace conv

int vae_conv(const conv::Call& call, const void* x, const void* past, const void* weight, const void* bias, void* out,
             DType dtype, int device, void* stream) {
    if (compute_capability(device) != 90) return cudaErrorNoKernelImageForDevice;
    if (dtype == DType::kFloat32) return cudaErrorInvalidValue;
    const auto launch = dtype == DType::kBFloat16 ? conv::launch_width<true> : conv::launch_width<false>;
    return on_device(device,
                     [&] { return launch(call, {x, past, weight, bias, out}, static_cast<cudaStream_t>(stream)); });
}

}  // namespace fastvid
