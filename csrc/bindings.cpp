// fastvid._C: the device code for Python. Pointers and streams come as integers (tensor.data_ptr(),
// stream.cuda_stream), so the module knows nothing of torch. Bad arguments -> ValueError, CUDA errors -> RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastvid.h"

namespace py = pybind11;

namespace {

using Shape = std::array<int64_t, 3>;    // T, H, W
using Strides = std::array<int64_t, 4>;  // C, T, H, W, in elements

fastvid::DType dtype_of(const std::string& name) {
    if (name == "float32") return fastvid::DType::kFloat32;
    if (name == "float16") return fastvid::DType::kFloat16;
    if (name == "bfloat16") return fastvid::DType::kBFloat16;
    throw std::invalid_argument("dtype is " + name + "; float32, float16 and bfloat16 are supported");
}

fastvid::Frames frames_of(const Shape& shape, const Strides& strides) {
    for (const int64_t extent : shape) {
        if (extent < 1) throw std::invalid_argument("frames, height and width must be at least 1");
    }
    return {shape[0], shape[1], shape[2], strides[0], strides[1], strides[2], strides[3]};
}

void check(int error, int device) {
    if (error == 0) return;
    std::string message = std::string("CUDA: ") + fastvid::error_string(error);
    const int capability = fastvid::compute_capability(device);
    if (capability > 0) {
        message += " (the device is sm_" + std::to_string(capability) + "; fastvid._C was built for " FASTVID_ARCHS ")";
    }
    throw std::runtime_error(message);
}

void to_rgb(uintptr_t src, uintptr_t dst, const std::string& dtype, const Shape& shape, const Strides& strides,
            int device, uintptr_t stream) {
    const auto type = dtype_of(dtype);
    const auto frames = frames_of(shape, strides);
    py::gil_scoped_release release;
    check(fastvid::to_rgb(reinterpret_cast<const void*>(src), reinterpret_cast<uint8_t*>(dst), type, frames, device,
                          reinterpret_cast<void*>(stream)),
          device);
}

void to_rgb_host(uintptr_t src, uintptr_t dst, const std::string& dtype, const Shape& shape, const Strides& strides) {
    const auto type = dtype_of(dtype);
    const auto frames = frames_of(shape, strides);
    py::gil_scoped_release release;
    fastvid::to_rgb_host(reinterpret_cast<const void*>(src), reinterpret_cast<uint8_t*>(dst), type, frames);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "fastvid's CUDA kernels; pointers, sizes and streams are integers";
    m.attr("ARCHS") = FASTVID_ARCHS;
    m.attr("CUDA_VERSION") = FASTVID_CUDA_VERSION;
    m.attr("SOURCE_HASH") = FASTVID_SOURCE_HASH;
    m.def("device_count", &fastvid::device_count);
    m.def("to_rgb", &to_rgb, py::arg("src"), py::arg("dst"), py::arg("dtype"), py::arg("shape"), py::arg("strides"),
          py::arg("device"), py::arg("stream"), "Frames [3, T, H, W] -> uint8 [T, H, W, 3] on a CUDA device.");
    m.def("to_rgb_host", &to_rgb_host, py::arg("src"), py::arg("dst"), py::arg("dtype"), py::arg("shape"),
          py::arg("strides"), "The same arithmetic and index maths on host memory.");
}
