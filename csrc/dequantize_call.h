// What dequantize.cu takes: the formats of quantized weights, and where a matrix of one lies.
#pragma once

#include <cstdint>
#include <string>

#include "fastvid.h"

namespace fastvid {
namespace weights {

enum class Format : int {
    kFp8E4M3,
    kFp8E5M2,
    kInt8,
    kQ8_0,
    kQ4_0,
    kQ4_1,
    kQ5_0,
    kQ5_1,
    kIQ4_NL,
    kQ2_K,
    kQ3_K,
    kQ4_K,
    kQ5_K,
    kQ6_K,
    kIQ4_XS,
    kMxFp8,
    kNvFp4,
    kNvFp4Low,
    kNf4,
    kNf4Double,
    kCount,
};

// Rows start to start + rows - 1 of a matrix, written one after the other to [rows, columns].
// row_bytes: of the codes of a row (nf4 has no rows: its codes go on over their ends). scales: 1, or one a row
// (fp8, int8); scales of a row (mxfp8, nvfp4); weights that share a scale, as a power of 2 (nf4).
// codes, scale, and: scale_2 (nvfp4) or the 16 values of codes (nf4); nested_map, nested_scale, nested_offset (nf4
// whose scales are codes too). What a format does not have is null.
struct Matrix {
    int64_t start, rows, columns, row_bytes, scales;
    const uint8_t* codes;
    const void* scale;
    const float* values;
    const float *nested_map, *nested_scale, *nested_offset;
};

// What is wrong with a call; "" for nothing.
inline std::string refuse(Format format, const Matrix& m, const void* out) {
    if (format < Format::kFp8E4M3 || format >= Format::kCount) return "no such format";
    if (m.start < 0 || m.rows < 0 || m.columns < 1 || m.scales < 0 || m.scales > (1ll << 40))
        return "rows, columns and scales are needed";
    const bool nf4 = format == Format::kNf4 || format == Format::kNf4Double, gguf = format >= Format::kQ8_0;
    if (m.codes == nullptr || out == nullptr) return "codes and out are needed";
    if (!(gguf && format <= Format::kIQ4_XS) && m.scale == nullptr) return "a scale is needed";
    if ((nf4 || format == Format::kNvFp4 || format == Format::kNvFp4Low) && m.values == nullptr) {
        return "values are needed";
    }
    if (format == Format::kNf4Double && !(m.nested_map && m.nested_scale && m.nested_offset)) {
        return "nested scales are needed";
    }
    const int64_t multiple = format >= Format::kQ2_K && format <= Format::kIQ4_XS ? 256 : 32;
    if (gguf && format <= Format::kIQ4_XS && m.columns % multiple) return "columns have to be whole blocks";
    return "";
}

}  // namespace weights
}  // namespace fastvid
