// What the device code offers to bindings.cpp: raw pointers, sizes and a stream; no torch, no Python.
// Every launcher returns 0, or the cudaError_t that the launch gave; the binding makes exceptions of them.
#pragma once

#include <cstdint>

namespace fastvid {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// Frames [3, T, H, W] of any strides (in elements; negative and zero ones are fine).
struct Frames {
    int64_t frames, height, width;
    int64_t stride_c, stride_t, stride_h, stride_w;
};

// rgb.cu: src in [-1, 1] -> dst, uint8 [T, H, W, 3], contiguous.
int to_rgb(const void* src, uint8_t* dst, DType dtype, const Frames& shape, int device, void* stream);
void to_rgb_host(const void* src, uint8_t* dst, DType dtype, const Frames& shape);

// device.cu: what this machine has; none of these fails where there is no driver.
const char* error_string(int error);
int device_count();
int compute_capability(int device);  // 90 for sm_90; 0 when it is not known

}  // namespace fastvid
