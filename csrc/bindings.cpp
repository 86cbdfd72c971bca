// fastvid._C: the device code for Python. Pointers and streams come as integers (tensor.data_ptr(),
// stream.cuda_stream), so the module knows nothing of torch. Bad arguments -> ValueError, CUDA errors -> RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "archs.h"
#include "attention_call.h"
#include "attention_eight_call.h"
#include "conv_call.h"
#include "dequantize_call.h"
#include "fastvid.h"
#include "vae_norm.h"

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

// needs: the only architecture that the kernel is compiled for, if it is not all of them.
void check_device(int device, const char* needs = "") {
    const int capability = fastvid::compute_capability(device);
    const std::string reason = capability == 0 ? fastvid::refuse_driver(FASTVID_CUDA_VERSION, fastvid::driver_version())
                                               : fastvid::refuse_device(FASTVID_ARCHS, needs, capability);
    if (!reason.empty()) throw std::runtime_error(reason);
}

void to_rgb(uintptr_t src, uintptr_t dst, const std::string& dtype, const Shape& shape, const Strides& strides,
            int device, uintptr_t stream) {
    const auto type = dtype_of(dtype);
    const auto frames = frames_of(shape, strides);
    check_device(device);
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

// The VAEs' convolutions

template <size_t n>
void fill(int64_t (&to)[n], const py::dict& from, const char* key) {
    const auto values = from[key].cast<std::array<int64_t, n>>();
    std::copy(values.begin(), values.end(), to);
}

fastvid::conv::Call conv_call_of(const py::dict& given) {
    fastvid::conv::Call call = {};
    fill(call.x, given, "x");
    fill(call.x_strides, given, "x_strides");
    fill(call.past_strides, given, "past_strides");
    fill(call.out, given, "out");
    fill(call.out_strides, given, "out_strides");
    fill(call.kernel, given, "kernel");
    fill(call.pad, given, "pad");
    call.history = given["history"].cast<int64_t>();
    call.past = given["past"].cast<int64_t>();
    call.top = given["top"].cast<int64_t>();
    call.stride = given["stride"].cast<int64_t>();
    call.stride_t = given["stride_t"].cast<int64_t>();
    call.doubled = given["doubled"].cast<int64_t>();
    call.interleaved = given["interleaved"].cast<int64_t>();
    call.add = given["add"].cast<int64_t>();
    return call;
}

fastvid::DType half_dtype_of(const std::string& name) {
    const auto type = dtype_of(name);
    if (type == fastvid::DType::kFloat32) {
        throw std::invalid_argument("dtype is float32; float16 and bfloat16 are supported (nearest: bfloat16)");
    }
    return type;
}

void refuse(const std::string& reason) {
    if (!reason.empty()) throw std::invalid_argument(reason);
}

void vae_conv(uintptr_t x, uintptr_t past, uintptr_t weight, uintptr_t bias, uintptr_t out, const std::string& dtype,
              const py::dict& given, int device, uintptr_t stream) {
    const auto type = half_dtype_of(dtype);
    const auto call = conv_call_of(given);
    const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    refuse(fastvid::conv::refuse(call, at(x), at(past), at(weight), at(bias), at(out)));
    check_device(device, "90a");
    py::gil_scoped_release release;
    check(fastvid::vae_conv(call, at(x), at(past), at(weight), at(bias), at(out), type, device, at(stream)), device);
}

void vae_norm(uintptr_t x, uintptr_t gamma, uintptr_t out, const std::string& dtype, const std::array<int64_t, 4>& size,
              int64_t channels, const std::array<int64_t, 4>& x_strides, const std::array<int64_t, 4>& out_strides,
              bool silu, int device, uintptr_t stream) {
    const auto type = half_dtype_of(dtype);
    fastvid::norm::Norm shape = {};
    std::copy(size.begin(), size.end(), shape.size);
    std::copy(x_strides.begin(), x_strides.end(), shape.x);
    std::copy(out_strides.begin(), out_strides.end(), shape.out);
    shape.channels = channels;
    shape.silu = silu;
    const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    refuse(fastvid::norm::refuse(shape, at(x), at(gamma), at(out)));
    check_device(device);
    py::gil_scoped_release release;
    check(fastvid::vae_norm(shape, at(x), at(gamma), at(out), type, device, at(stream)), device);
}

// Attention

fastvid::attention::Call attention_call_of(const py::dict& given) {
    fastvid::attention::Call call = {};
    call.batch = given["batch"].cast<int64_t>();
    call.queries = given["queries"].cast<int64_t>();
    call.keys = given["keys"].cast<int64_t>();
    call.heads = given["heads"].cast<int64_t>();
    call.head_dim = given["head_dim"].cast<int64_t>();
    fill(call.q_strides, given, "q_strides");
    fill(call.k_strides, given, "k_strides");
    fill(call.v_strides, given, "v_strides");
    call.tiles = given["tiles"].cast<int64_t>();
    call.largest = given["largest"].cast<int64_t>();
    call.lists = given["lists"].cast<int64_t>();
    call.pairs = given["pairs"].cast<int64_t>();
    return call;
}

fastvid::attention::Lists lists_of(const std::vector<uintptr_t>& at) {
    if (at.empty()) return {};
    if (at.size() != 7) throw std::invalid_argument("attention walks over 6 lists with a counter, or none");
    const auto tokens = [&at](int i) { return reinterpret_cast<const int32_t*>(at[i]); };
    const auto rows = [&at](int i) { return reinterpret_cast<const int64_t*>(at[i]); };
    return {tokens(0), rows(1), tokens(2), rows(3), tokens(4), tokens(5), reinterpret_cast<int32_t*>(at[6])};
}

void attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, const std::string& dtype,
               const py::dict& given, const std::vector<uintptr_t>& lists, float scale, int device, uintptr_t stream) {
    const auto type = half_dtype_of(dtype);
    const auto call = attention_call_of(given);
    const auto walked = lists_of(lists);
    if ((call.tiles > 0) != !lists.empty()) throw std::invalid_argument("lists are given with tiles of queries");
    const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    refuse(fastvid::attention::refuse(call, at(q), at(k), at(v), at(out), scale));
    check_device(device, "90a");
    py::gil_scoped_release release;
    check(fastvid::attend(call, walked, scale, at(q), at(k), at(v), at(out), reinterpret_cast<float*>(lse), type,
                          device, at(stream)),
          device);
}

// Attention of 8-bit values

bool is_int8(const std::string& kind) {
    if (kind != "int8" && kind != "fp8") throw std::invalid_argument("kind is " + kind + "; it can be fp8 or int8");
    return kind == "int8";
}

void quantize(const std::string& part, uintptr_t x, uintptr_t mean, uintptr_t out, uintptr_t scales, uintptr_t shift,
              const std::string& kind, const std::string& dtype, const py::dict& given, uintptr_t tiles, int device,
              uintptr_t stream) {
    using fastvid::quantize::Part;
    const auto type = half_dtype_of(dtype);
    const bool int8 = is_int8(kind);
    if (part != "queries" && part != "keys" && part != "values") {
        throw std::invalid_argument("part is " + part + "; it can be queries, keys or values");
    }
    const auto which = part == "queries" ? Part::kQueries : part == "keys" ? Part::kKeys : Part::kValues;
    fastvid::quantize::Call call = {};
    call.batch = given["batch"].cast<int64_t>();
    call.tokens = given["tokens"].cast<int64_t>();
    call.heads = given["heads"].cast<int64_t>();
    call.head_dim = given["head_dim"].cast<int64_t>();
    fill(call.strides, given, "strides");
    call.count = given["count"].cast<int64_t>();
    call.each = given["each"].cast<int64_t>();
    call.tiles = reinterpret_cast<const int32_t*>(tiles);
    const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    const auto numbers = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
    refuse(fastvid::quantize::refuse(call, at(x)));
    check_device(device);
    py::gil_scoped_release release;
    check(fastvid::quantize_part(which, call, int8, at(x), numbers(mean), at(out), numbers(scales), numbers(shift),
                                 type, device, at(stream)),
          device);
}

void attention_eight(const std::array<uintptr_t, 3>& tensors, const std::array<uintptr_t, 3>& scales, int64_t blocks,
                     uintptr_t out, uintptr_t lse, const std::string& kind, const std::string& dtype,
                     const py::dict& given, const std::vector<uintptr_t>& lists, float scale, int device,
                     uintptr_t stream) {
    const auto type = half_dtype_of(dtype);
    const bool int8 = is_int8(kind);
    const auto call = attention_call_of(given);
    const auto walked = lists_of(lists);
    if ((call.tiles > 0) != !lists.empty()) throw std::invalid_argument("lists are given with tiles of queries");
    const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    const auto numbers = [&scales](int i) { return reinterpret_cast<const float*>(scales[i]); };
    const fastvid::attention::Eights eights = {
        at(tensors[0]),
        at(tensors[1]),
        at(tensors[2]),
        {numbers(0), numbers(1), numbers(2), static_cast<int>(std::min<int64_t>(blocks, 1 << 30))}};
    refuse(fastvid::attention::refuse_eight(call, eights.scales, at(out), scale));
    check_device(device, "90a");
    py::gil_scoped_release release;
    check(fastvid::attend_eight(call, walked, eights, scale, int8, at(out), reinterpret_cast<float*>(lse), type, device,
                                at(stream)),
          device);
}

// Quantized weights

fastvid::weights::Matrix matrix_of(const py::dict& given) {
    const auto size = [&given](const char* key) { return given[key].cast<int64_t>(); };
    const auto at = [&given](const char* key) { return reinterpret_cast<const void*>(given[key].cast<uintptr_t>()); };
    const auto numbers = [&at](const char* key) { return static_cast<const float*>(at(key)); };
    return {size("start"),
            size("rows"),
            size("columns"),
            size("row_bytes"),
            size("scales"),
            static_cast<const uint8_t*>(at("codes")),
            at("scale"),
            numbers("values"),
            numbers("nested_map"),
            numbers("nested_scale"),
            numbers("nested_offset")};
}

void dequantize(int format, const py::dict& given, uintptr_t out, const std::string& dtype, int device,
                uintptr_t stream) {
    const auto type = dtype_of(dtype);
    const auto matrix = matrix_of(given);
    const auto at = reinterpret_cast<void*>(out);
    refuse(fastvid::weights::refuse(static_cast<fastvid::weights::Format>(format), matrix, at));
    check_device(device);
    py::gil_scoped_release release;
    check(fastvid::dequantize(format, matrix, at, type, device, reinterpret_cast<void*>(stream)), device);
}

void dequantize_host(int format, const py::dict& given, uintptr_t out, const std::string& dtype) {
    const auto type = dtype_of(dtype);
    const auto matrix = matrix_of(given);
    const auto at = reinterpret_cast<void*>(out);
    refuse(fastvid::weights::refuse(static_cast<fastvid::weights::Format>(format), matrix, at));
    py::gil_scoped_release release;
    fastvid::dequantize_host(format, matrix, at, type);
}

void add_weights(py::module_& m) {
    m.def("dequantize", &dequantize, py::arg("format"), py::arg("matrix"), py::arg("out"), py::arg("dtype"),
          py::arg("device"), py::arg("stream"),
          "Rows of a quantized weight -> numbers on a CUDA device; `matrix` as quantized_cuda.matrix_of makes it.");
    m.def("dequantize_host", &dequantize_host, py::arg("format"), py::arg("matrix"), py::arg("out"), py::arg("dtype"),
          "The same arithmetic on host memory.");
}

void add_attention(py::module_& m) {
    m.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
          py::arg("dtype"), py::arg("call"), py::arg("lists"), py::arg("scale"), py::arg("device"), py::arg("stream"),
          "Attention on sm_90; `call` and `lists` as attention_gpu.prepare makes them, lse may be 0.");
    m.def("quantize", &quantize, py::arg("part"), py::arg("x"), py::arg("mean"), py::arg("out"), py::arg("scales"),
          py::arg("shift"), py::arg("kind"), py::arg("dtype"), py::arg("call"), py::arg("tiles"), py::arg("device"),
          py::arg("stream"), "Queries, keys or values to 8 bits; `call` as attention_eight.source_of makes it.");
    m.def("attention_eight", &attention_eight, py::arg("tensors"), py::arg("scales"), py::arg("blocks"), py::arg("out"),
          py::arg("lse"), py::arg("kind"), py::arg("dtype"), py::arg("call"), py::arg("lists"), py::arg("scale"),
          py::arg("device"), py::arg("stream"), "Attention on sm_90 of what `quantize` made; lse may be 0.");
}

void add_vae(py::module_& m) {
    m.def(
        "vae_conv", &vae_conv, py::arg("x"), py::arg("past"), py::arg("weight"), py::arg("bias"), py::arg("out"),
        py::arg("dtype"), py::arg("call"), py::arg("device"), py::arg("stream"),
        "A convolution of [B, C, T, H, W] with contiguous channels on sm_90; `call` as vae_kernels.call_of makes it.");
    m.def("vae_norm", &vae_norm, py::arg("x"), py::arg("gamma"), py::arg("out"), py::arg("dtype"), py::arg("size"),
          py::arg("channels"), py::arg("x_strides"), py::arg("out_strides"), py::arg("silu"), py::arg("device"),
          py::arg("stream"), "RMS norm over contiguous channels, then SiLU or not; sizes and strides of B, T, H, W.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "fastvid's CUDA kernels; pointers, sizes and streams are integers";
    m.attr("ARCHS") = FASTVID_ARCHS;
    m.attr("CUDA_VERSION") = FASTVID_CUDA_VERSION;
    const std::map<std::string, std::string> hashes FASTVID_SOURCE_HASHES;
    m.attr("SOURCE_HASHES") = hashes;
    m.def("device_count", &fastvid::device_count);
    m.def("to_rgb", &to_rgb, py::arg("src"), py::arg("dst"), py::arg("dtype"), py::arg("shape"), py::arg("strides"),
          py::arg("device"), py::arg("stream"), "Frames [3, T, H, W] -> uint8 [T, H, W, 3] on a CUDA device.");
    m.def("to_rgb_host", &to_rgb_host, py::arg("src"), py::arg("dst"), py::arg("dtype"), py::arg("shape"),
          py::arg("strides"), "The same arithmetic and index maths on host memory.");
    add_vae(m);
    add_attention(m);
    add_weights(m);
}
