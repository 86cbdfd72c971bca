// What the device code offers to bindings.cpp: raw pointers, sizes and a stream; no torch, no Python.
// Every launcher returns 0, or the cudaError_t that the launch gave; the binding makes exceptions of them.
#pragma once

#include <cstdint>

namespace fastvid {

namespace conv {
struct Call;
}
namespace norm {
struct Norm;
}
namespace attention {
struct Call;
struct Lists;
struct Eights;
}  // namespace attention
namespace weights {
struct Matrix;
}
namespace quantize {
struct Call;
enum class Part : int { kQueries, kKeys, kValues };
}  // namespace quantize

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// Frames [3, T, H, W] of any strides (in elements; negative and zero ones are fine).
struct Frames {
    int64_t frames, height, width;
    int64_t stride_c, stride_t, stride_h, stride_w;
};

// rgb.cu: src in [-1, 1] -> dst, uint8 [T, H, W, 3], contiguous.
int to_rgb(const void* src, uint8_t* dst, DType dtype, const Frames& shape, int device, void* stream);
void to_rgb_host(const void* src, uint8_t* dst, DType dtype, const Frames& shape);

// conv.cu (sm_90 alone), vae_norm.cu: fp16 and bf16; conv_call.h and vae_norm.h say what they take.
int vae_conv(const conv::Call& call, const void* x, const void* past, const void* weight, const void* bias, void* out,
             DType dtype, int device, void* stream);
int vae_norm(const norm::Norm& shape, const void* x, const void* gamma, void* out, DType dtype, int device,
             void* stream);

// attention.cu (sm_90 alone): fp16 and bf16; attention_call.h says what it takes. lse may be null.
int attend(const attention::Call& call, const attention::Lists& lists, float scale, const void* q, const void* k,
           const void* v, void* out, float* lse, DType dtype, int device, void* stream);

// quantize.cu: fp16 and bf16 to 8 bits; quantize.h says what it takes. attention_eight.cu (sm_90 alone): attention of
// what it made; lse may be null.
int quantize_part(quantize::Part part, const quantize::Call& call, bool int8, const void* x, const float* mean,
                  void* out, float* scales, float* shift, DType dtype, int device, void* stream);
int attend_eight(const attention::Call& call, const attention::Lists& lists, const attention::Eights& at, float scale,
                 bool int8, void* out, float* lse, DType dtype, int device, void* stream);

// dequantize.cu: rows of a quantized weight to numbers; dequantize_call.h says what it takes, and numbers the formats.
int dequantize(int format, const weights::Matrix& matrix, void* out, DType dtype, int device, void* stream);
void dequantize_host(int format, const weights::Matrix& matrix, void* out, DType dtype);

// device.cu: what this machine has; none of these fails where there is no driver.
const char* error_string(int error);
int device_count();
int driver_version();                // the latest CUDA that the driver knows: 12080 for 12.8; 0 without a driver
int compute_capability(int device);  // 90 for sm_90; 0 when it is not known

}  // namespace fastvid
