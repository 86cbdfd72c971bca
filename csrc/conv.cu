// The VAEs' convolutions on sm_90a: an implicit matrix product with TMA and wgmma; conv.h has the formula,
// conv_kernel.h the block, conv_sm90.h the instructions.
//
// What limits it, for N = 96 channels of a tile (estimates from the data sheet: not measured). A tap of 64 channels
// takes the matrix units 256 * 64 * 96 / 2,048 = 768 clocks for 256 pixels. An H200's L2 gives about 24 bytes a clock
// and multiprocessor, and a tap needs, in KiB for 128 pixels and in bytes a clock:
//
//   128 pixels, each tap's pixels loaded      16 + 12      75    (before)
//   the same, weights to a cluster of two     16 + 6       59    and 75 into shared memory
//   256 pixels                                16 + 6       59
//   256 pixels, a box for 9 taps              2.3 + 6      22    (this)
//
// So a block has 256 pixels, which makes a cluster needless, and the 3x3 taps of a frame share a box of 18 x 18. Their
// left matrices begin at any row, where a descriptor can begin at eights of rows only: they go through registers, by
// ldmatrix. Four warpgroups with 64 pixels each hide each other's waits; 64 accumulators, 16 registers of the left
// matrix and what else there is fit into the 112 that each thread can have. Wider tiles of channels would not. Shared
// memory is read at 64 + 4,096 / N bytes a clock and written at 22, of 128: N = 96 is at this limit, 128 below it.
//
// Why RMS norm and SiLU are a pass of their own (vae_norm.cu), not part of the load: a box would be normalised for each
// of 3 frames of taps anew and again for every tile of channels, two operations of the special function unit a value.
// 324 * 64 * 2 / 16 = 2,592 clocks for the 6,912 of its 9 taps, and for what passes through shared memory twice more,
// which is at its limit. The pass moves 4 bytes a value, 16 % of the product's time for N = 96, 8 % for 192, 4 % for
// 384, and it makes the frames that the next chunk looks back on, which have to be written anyhow.
#include <cuda_runtime.h>

#include "conv_call.h"
#include "conv_sm90.h"
#include "fastvid.h"
#include "on_device.h"
#include "tensor_map.h"

namespace fastvid {
namespace conv {
namespace {

template <int N, bool BF16, Kind K>
__global__ void __launch_bounds__(kThreads, 1)
    conv_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Conv s, const uint16_t* bias) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    if (start % 1024) __trap();  // the swizzle counts from there
    Sm90<N, BF16> hw(maps, s, start);
    if (threadIdx.x == 0) hw.init();
    __syncthreads();
    const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // the same for a warp, and known to be
    if (group == kGroups) {
        sm90::keep_registers<kProducerRegisters>();
        if (threadIdx.x == kConsumers * 32) produce<N, K>(hw, s, blockIdx.x, gridDim.x);
        return;
    }
    sm90::take_registers<kConsumerRegisters>();
    State<Sm90<N, BF16>> state;
    consume<N, K>(hw, state, s, group, blockIdx.x, gridDim.x, bias);
#else
    __trap();  // never launched: the launcher asks which device it is
#endif
}

struct Pointers {
    const void *x, *past, *weight, *bias;
    void* out;
};

cudaError_t encode_all(Maps& maps, const Call& call, const Conv& s, const Pointers& at, int tile_n, bool bf16) {
    cudaError_t error = encode(&maps.x, map_of_pixels(call, s, at.x, call.x[2], call.x_strides), bf16);
    maps.past = maps.x;
    if (error == cudaSuccess && call.past) {
        error = encode(&maps.past, map_of_pixels(call, s, at.past, call.history, call.past_strides), bf16);
    }
    if (error == cudaSuccess) error = encode(&maps.weights, map_of_weights(call, s, at.weight, tile_n), bf16);
    for (int i = 0; i < 4 && error == cudaSuccess; ++i) {
        if (i < outs_of(call)) {
            error = encode(&maps.out[i], map_of_out(call, s, at.out, i), bf16);
        } else {
            maps.out[i] = maps.out[0];
        }
    }
    return error;
}

template <int N, bool BF16, Kind K>
cudaError_t launch(const Call& call, const Pointers& at, int device, cudaStream_t stream) {
    const Conv s = conv_of(call);
    const auto kernel = conv_kernel<N, BF16, K>;
    int processors = 0;
    Maps maps;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = encode_all(maps, call, s, at, N, BF16);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem);
    }
    if (error != cudaSuccess) return error;
    const int64_t grid = tiles(s, N) < processors ? tiles(s, N) : processors;
    kernel<<<static_cast<unsigned>(grid), kThreads, kSmem, stream>>>(maps, s, static_cast<const uint16_t*>(at.bias));
    return cudaGetLastError();
}

template <int N, bool BF16>
cudaError_t launch_kind(const Call& call, const Pointers& at, int device, cudaStream_t stream) {
    switch (kind_of(call)) {
        case Kind::kAdd:
            return launch<N, BF16, Kind::kAdd>(call, at, device, stream);
        case Kind::kSplit:
            return launch<N, BF16, Kind::kSplit>(call, at, device, stream);
        default:
            return launch<N, BF16, Kind::kPlain>(call, at, device, stream);
    }
}

template <bool BF16>
cudaError_t launch_width(const Call& call, const Pointers& at, int device, cudaStream_t stream) {
    const bool narrow = choose_width(static_cast<int>(outputs_of(call))) == 96;
    return narrow ? launch_kind<96, BF16>(call, at, device, stream) : launch_kind<128, BF16>(call, at, device, stream);
}

}  // namespace
}  // namespace conv

int vae_conv(const conv::Call& call, const void* x, const void* past, const void* weight, const void* bias, void* out,
             DType dtype, int device, void* stream) {
    const int capability = compute_capability(device);  // 0 if it is not known: CUDA says why below
    if (capability != 0 && capability != 90) return cudaErrorNoKernelImageForDevice;
    if (dtype == DType::kFloat32) return cudaErrorInvalidValue;
    const auto launch = dtype == DType::kBFloat16 ? conv::launch_width<true> : conv::launch_width<false>;
    return on_device(
        device, [&] { return launch(call, {x, past, weight, bias, out}, device, static_cast<cudaStream_t>(stream)); });
}

}  // namespace fastvid
