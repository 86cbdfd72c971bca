// Where sm_90's wgmma and TMA expect values to be: descriptors, the swizzle, registers, tensor maps. Host and device
// compile the same functions; nothing here needs CUDA's headers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTVID_ANY __host__ __device__ __forceinline__
#define FASTVID_UNROLL _Pragma("unroll")
#else
#define FASTVID_ANY inline
#define FASTVID_UNROLL
#endif

namespace fastvid::sm90 {

constexpr int kBytes = 2;                        // of a value
constexpr int kRow = 128;                        // bytes of a row of the 128-byte swizzle
constexpr int kColumns = kRow / kBytes;          // values of it
constexpr int kDepth = 16;                       // values along K that one wgmma takes
constexpr int kAligned = 16;                     // bytes, of the addresses and strides of a tensor map
constexpr int64_t kFarthest = int64_t{1} << 40;  // stride in bytes that a map can hold, and no more

// A tensor map: extents and the box from the innermost dimension on, strides in bytes from the second one on.
struct Map {
    const void* base;
    int rank;
    uint64_t extent[5];
    uint64_t stride[4];
    uint32_t box[5];
    uint32_t every[5];   // elements from one that is read to the next
    int bytes = kBytes;  // of a value; a box's row, 64 or 128 bytes, says how it is swizzled
};

inline bool aligned(const void* pointer, int bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

FASTVID_ANY int divide_up(int a, int b) {
    return (a + b - 1) / b;
}

FASTVID_ANY int take(int64_t& number, int of) {
    const int rest = static_cast<int>(number % of);
    number /= of;
    return rest;
}

FASTVID_ANY int take(int& number, int of) {
    const uint32_t whole = static_cast<uint32_t>(number) / static_cast<uint32_t>(of);  // a signed one takes longer
    const int rest = number - static_cast<int>(whole) * of;
    number = static_cast<int>(whole);
    return rest;
}

// The 128-byte swizzle of TMA and wgmma: bits 4 to 6 of an address are mixed with bits 7 to 9.
FASTVID_ANY uint32_t swizzled(uint32_t address) {
    return address ^ (address >> 7 & 7) << 4;
}

// Descriptor of a matrix [rows, 16] in shared memory whose rows are swizzled, 128 bytes, 8 rows in 1,024: address in
// bits 0-13, leading offset (not used by this layout) in 16-29, 1,024 between eights of rows in 32-45, all of them in
// 16 bytes, and the swizzle in 62-63. A matrix further right in a row begins 32 bytes further on.
FASTVID_ANY uint64_t descriptor(uint32_t address) {
    return (address & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{8 * kRow / 16} << 32 | uint64_t{1} << 62;
}

// The same of rows of 64 bytes, 8 of them in 512: bits 4 and 5 of an address are mixed with bits 7 and 8.
template <int Row>
FASTVID_ANY uint64_t row_descriptor(uint32_t address) {
    static_assert(Row == kRow || Row == kRow / 2, "rows of a swizzle");
    return (address & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{8 * Row / 16} << 32 |
           uint64_t{Row == kRow ? 1 : 2} << 62;
}

// Descriptor of a matrix [16, columns] that is read transposed (its columns are N): rows of 64 columns, swizzled as
// above, and `panel` bytes from them to the next 64 columns of the same rows, which is the leading offset; 1,024
// between eights of rows. A matrix further down begins 2,048 bytes further on.
FASTVID_ANY uint64_t transposed_descriptor(uint32_t address, uint32_t panel) {
    return (address & 0x3FFFF) >> 4 | uint64_t{panel >> 4} << 16 | uint64_t{8 * kRow / 16} << 32 | uint64_t{1} << 62;
}

// Where the accumulators of a thread of a warpgroup belong: wgmma's m64nNk16 gives it, for every 8 columns, two
// neighbours of one row and two of the row 8 below. Its left matrix in registers lies in the same way.
FASTVID_ANY int row_of(int thread, int half) {
    return thread / 32 * 16 + thread % 32 / 4 + half * 8;
}
FASTVID_ANY int column_of(int thread, int eight) {
    return eight * 8 + thread % 4 * 2;
}

}  // namespace fastvid::sm90
