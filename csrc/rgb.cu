// Decoded frames [3, T, H, W] -> uint8 [T, H, W, 3]; the arithmetic is in rgb.h.
//
// Bound by memory: 12 (fp32) or 6 (16-bit) bytes read and 3 written a pixel. A thread takes 16 bytes of each
// plane (4 or 8 pixels) and writes 3 or 6 words; neighbouring threads take neighbouring runs, so each plane is
// read in whole sectors, and the partly written sectors of a warp meet in the L2.
#include "on_device.h"
#include "rgb.h"

namespace fastvid {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads) rgb_kernel(const T* src, uint8_t* dst, Frames f) {
    const int64_t col = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * VEC;
    if (col >= f.width) {
        return;
    }
    for (int64_t row = blockIdx.y; row < f.frames * f.height; row += gridDim.y) {
        rgb_run<T, VEC>(src, dst, f, row, col);
    }
}

// The loop that stands for the grid on the host.
template <typename T, int VEC>
void rgb_loop(const T* src, uint8_t* dst, const Frames& f) {
    for (int64_t row = 0; row < f.frames * f.height; ++row) {
        for (int64_t col = 0; col < f.width; col += VEC) {
            rgb_run<T, VEC>(src, dst, f, row, col);
        }
    }
}

template <typename T, int VEC>
void launch(const T* src, uint8_t* dst, const Frames& f, cudaStream_t stream) {
    const int64_t rows = f.frames * f.height;
    const int64_t runs = (f.width + VEC - 1) / VEC;
    const dim3 grid(static_cast<unsigned>((runs + kThreads - 1) / kThreads),
                    static_cast<unsigned>(rows < kMaxGridY ? rows : kMaxGridY));
    rgb_kernel<T, VEC><<<grid, kThreads, 0, stream>>>(src, dst, f);
}

// Calls `run(typed src, VEC as a type)` with what suits the frames.
template <typename T, typename Run>
void with_width(const void* src, const uint8_t* dst, const Frames& f, Run run) {
    constexpr int kVec = 16 / sizeof(T);
    const T* typed = static_cast<const T*>(src);
    if (vectors_fit(src, dst, f, kVec)) {
        run(typed, std::integral_constant<int, kVec>());
    } else {
        run(typed, std::integral_constant<int, 1>());
    }
}

template <typename Run>
void with_dtype(const void* src, const uint8_t* dst, DType dtype, const Frames& f, Run run) {
    switch (dtype) {
        case DType::kFloat32:
            return with_width<float>(src, dst, f, run);
        case DType::kFloat16:
            return with_width<__half>(src, dst, f, run);
        case DType::kBFloat16:
            return with_width<__nv_bfloat16>(src, dst, f, run);
    }
}

}  // namespace

int to_rgb(const void* src, uint8_t* dst, DType dtype, const Frames& shape, int device, void* stream) {
    const Frames f = collapse_rows(shape);
    return on_device(device, [&] {
        with_dtype(src, dst, dtype, f, [&](auto typed, auto vec) {
            launch<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>, decltype(vec)::value>(
                typed, dst, f, static_cast<cudaStream_t>(stream));
        });
        return cudaGetLastError();
    });
}

void to_rgb_host(const void* src, uint8_t* dst, DType dtype, const Frames& shape) {
    const Frames f = collapse_rows(shape);
    with_dtype(src, dst, dtype, f, [&](auto typed, auto vec) {
        rgb_loop<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>, decltype(vec)::value>(typed, dst, f);
    });
}

}  // namespace fastvid
