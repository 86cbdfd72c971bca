// Quantized weights -> fp32, fp16 or bf16, for a product by cuBLAS; the arithmetic is in dequantize.h.
//
// Bound by memory, where a weight is 0.3 to 1.1 bytes read and 2 written: a thread makes 8 neighbouring weights of a
// row and writes them as 16 bytes. Their block's factors are read by neighbouring threads too, and come from the L1.
// Not verified or measured on a GPU yet.
#include "dequantize.h"
#include "on_device.h"

namespace fastvid {
namespace weights {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

template <Format F, typename T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Matrix m, T* out, bool aligned) {
    const int64_t k = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRun;
    if (k >= m.columns) {
        return;
    }
    for (int64_t row = blockIdx.y; row < m.rows; row += gridDim.y) {
        run<F, T>(m, out, row, k, aligned);
    }
}

// The loop that stands for the grid on the host.
template <Format F, typename T>
void loop(const Matrix& m, T* out, bool aligned) {
    for (int64_t row = 0; row < m.rows; ++row) {
        for (int64_t k = 0; k < m.columns; k += kRun) {
            run<F, T>(m, out, row, k, aligned);
        }
    }
}

template <Format F, typename T>
void launch(const Matrix& m, T* out, bool aligned, cudaStream_t stream) {
    const int64_t runs = (m.columns + kRun - 1) / kRun;
    const dim3 grid(static_cast<unsigned>((runs + kThreads - 1) / kThreads),
                    static_cast<unsigned>(m.rows < kMaxGridY ? m.rows : kMaxGridY));
    dequantize_kernel<F, T><<<grid, kThreads, 0, stream>>>(m, out, aligned);
}

template <Format F, typename T>
cudaError_t made(const Matrix& m, void* out, bool on_host, cudaStream_t stream) {
    T* typed = static_cast<T*>(out);
    const bool aligned = m.columns % kRun == 0 && reinterpret_cast<uintptr_t>(out) % alignof(Run<T>) == 0;
    if (on_host) {
        loop<F, T>(m, typed, aligned);
        return cudaSuccess;
    }
    launch<F, T>(m, typed, aligned, stream);
    return cudaGetLastError();
}

using Made = cudaError_t (*)(const Matrix&, void*, bool, cudaStream_t);

template <Format F>
Made pick(DType dtype) {
    switch (dtype) {
        case DType::kFloat32:
            return made<F, float>;
        case DType::kFloat16:
            return made<F, __half>;
        default:
            return made<F, __nv_bfloat16>;
    }
}

template <int F>
Made pick_format(int format, DType dtype) {
    if constexpr (F == static_cast<int>(Format::kCount)) {
        return nullptr;
    } else {
        return format == F ? pick<static_cast<Format>(F)>(dtype) : pick_format<F + 1>(format, dtype);
    }
}

}  // namespace
}  // namespace weights

int dequantize(int format, const weights::Matrix& m, void* out, DType dtype, int device, void* stream) {
    const auto make = weights::pick_format<0>(format, dtype);
    if (make == nullptr) return cudaErrorInvalidValue;
    if (m.rows == 0) return cudaSuccess;
    return on_device(device, [&] { return make(m, out, false, static_cast<cudaStream_t>(stream)); });
}

void dequantize_host(int format, const weights::Matrix& m, void* out, DType dtype) {
    if (const auto make = weights::pick_format<0>(format, dtype)) make(m, out, true, nullptr);
}

}  // namespace fastvid
