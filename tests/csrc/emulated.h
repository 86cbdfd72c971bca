// What TMA, mbarriers and wgmma are specified to do, on the CPU, from the very coordinates, tensor maps and descriptors
// that a GPU would be given. Written from the manuals, not with the functions of csrc/ that are tested with it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "sm90_layout.h"

#ifndef EMULATED_SECONDS
#define EMULATED_SECONDS 20  // that a wait may take; mutate_kernels.py has less patience
#endif

namespace emulated {

constexpr std::chrono::seconds kPatience(EMULATED_SECONDS);

using fastvid::sm90::Map;

inline float widen(uint16_t bits, bool bf16) {
    if (bf16) {
        const uint32_t word = uint32_t{bits} << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}

inline uint16_t narrow(float value, bool bf16) {
    uint16_t bits;
    if (bf16) {
        uint32_t word;
        std::memcpy(&word, &value, 4);
        if (value != value) return 0x7FFF;
        return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
    }
    const _Float16 half = static_cast<_Float16>(value);
    std::memcpy(&bits, &half, 2);
    return bits;
}

// e4m3: no infinities, and one NaN of each sign.
inline float widen_e4m3(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (exponent == 15 && mantissa == 7) return NAN;
    const float value = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
    return bits & 0x80 ? -value : value;
}

// To the nearest, ties to even; what is too large becomes the largest.
inline uint8_t narrow_e4m3(float value) {
    if (value != value) return 0x7F;
    const uint8_t sign = std::signbit(value) ? 0x80 : 0;
    const float size = std::fmin(std::fabs(value), 448.0f);
    int power;
    std::frexp(size, &power);  // size < 2^power
    const int exponent = std::max(power - 1, -6);
    // In units of the last place: 8 to 15 of them, or fewer below the smallest normal number; 16 carries over.
    const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));
    if (units < 8) return static_cast<uint8_t>(sign | units);
    return static_cast<uint8_t>(sign | (((exponent + 7) << 3) + units - 8));
}

inline int8_t narrow_int8(float value) {
    return value != value ? 0 : static_cast<int8_t>(static_cast<int64_t>(std::nearbyint(value)));
}

template <bool Int8>
uint32_t pack8(float a, float b, float c, float d) {
    const auto byte = [](float x) { return uint32_t{Int8 ? static_cast<uint8_t>(narrow_int8(x)) : narrow_e4m3(x)}; };
    return byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
}

struct Stopped : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A phase ends when as many have arrived as it expects and all bytes have come; wait(p) waits for the end of a phase
// of parity p: before any has ended, those of parity 1 count as ended.
class Barrier {
  public:
    explicit Barrier(int expected) : expected_(expected), left_(expected) {}

    void arrive(int bytes = 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (left_ == 0) throw Stopped("a barrier got more arrivals than a phase has");
        bytes_ += bytes;
        --left_;
        turn();
    }

    void complete(int bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        bytes_ -= bytes;
        turn();
    }

    // How many phases have ended then.
    uint32_t wait(uint32_t parity) {
        std::unique_lock<std::mutex> lock(mutex_);
        const bool ended = changed_.wait_for(lock, kPatience, [&] { return (phase_ & 1) != parity; });
        if (!ended) throw Stopped("a barrier was waited for in vain");
        return phase_;
    }

    // As it was before the first phase, but for which parity is next.
    bool at_rest() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return left_ == expected_ && bytes_ == 0;
    }

  private:
    void turn() {
        if (left_ || bytes_) return;
        left_ = expected_;
        ++phase_;
        changed_.notify_all();
    }

    int expected_, left_, bytes_ = 0;
    uint32_t phase_ = 0;
    std::mutex mutex_;
    std::condition_variable changed_;
};

// A barrier of the block by number, in which whole warpgroups meet: the last of `expected` opens it for those who wait.
class Meeting {
  public:
    Meeting(int expected) : expected_(expected) {}

    void arrive() {
        const std::lock_guard<std::mutex> lock(mutex_);
        come();
    }
    void meet() {
        std::unique_lock<std::mutex> lock(mutex_);
        const uint32_t phase = phase_;
        come();
        const bool met = changed_.wait_for(lock, kPatience, [&] { return phase_ != phase; });
        if (!met) throw Stopped("nobody came to meet");
    }
    bool at_rest() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return came_ == 0;
    }

  private:
    void come() {
        if (++came_ < expected_) return;
        came_ = 0;
        ++phase_;
        changed_.notify_all();
    }

    int expected_, came_ = 0;
    uint32_t phase_ = 0;
    std::mutex mutex_;
    std::condition_variable changed_;
};

// Shared memory of a block, and its 16-bit matrices in it. base: where it begins, so that addresses are not small by
// chance; it holds what no load has written.
class Memory {
  public:
    Memory(uint32_t base, int bytes, bool bf16) : bf16_(bf16), base_(base), bytes_(bytes, 0x7F) {}

    uint32_t address(int at) const { return base_ + at; }
    bool bf16() const { return bf16_; }
    // What lies at an address itself, wherever the swizzle has it from.
    uint8_t byte(uint32_t address) { return *at(address, 1); }
    uint16_t word(uint32_t address) {
        uint16_t bits;
        std::memcpy(&bits, at(address, 2), 2);
        return bits;
    }

    // A box by TMA, its rows of 128 or 64 bytes swizzled; the bytes that have come.
    int load(const Map& map, uint32_t to, const std::vector<int64_t>& from) {
        const int columns = static_cast<int>(map.box[0]), bytes = map.bytes, row = columns * bytes;
        if (row != 128 && row != 64) throw Stopped("a swizzled box has rows of 128 bytes, or of 64");
        if (to % (row * 8)) throw Stopped("a swizzled box begins at no multiple of 8 rows");
        check(map);
        uint32_t count[5] = {1, 1, 1, 1, 1};
        int total = 1;
        for (int i = 0; i < map.rank; ++i) {
            if (map.box[i] > 256) throw Stopped("a box has at most 256 elements a side");
            count[i] = (map.box[i] + map.every[i] - 1) / map.every[i];
            total *= static_cast<int>(count[i]);
        }
        for (int i = 0; i < total; i += columns) {
            int rest = i / columns;
            bool inside = true;
            int64_t offset = from[0] * bytes;
            for (int d = 1; d < map.rank; ++d) {
                const int64_t place = from[d] + static_cast<int64_t>(rest % count[d]) * map.every[d];
                rest /= static_cast<int>(count[d]);
                inside = inside && place >= 0 && place < static_cast<int64_t>(map.extent[d]);
                offset += place * static_cast<int64_t>(map.stride[d - 1]);
            }
            for (int c = 0; c < columns; ++c) {
                uint8_t* target = at(mixed(to + static_cast<uint32_t>((i + c) * bytes), row), bytes);
                const bool real = inside && from[0] + c >= 0 && from[0] + c < static_cast<int64_t>(map.extent[0]);
                if (real) std::memcpy(target, static_cast<const uint8_t*>(map.base) + offset + c * bytes, bytes);
                if (!real) std::memset(target, 0, bytes);
            }
        }
        return total * bytes;
    }

    void put(uint32_t address, uint32_t word) { std::memcpy(at(address, 4), &word, 4); }
    uint32_t get(uint32_t address) {
        uint32_t word;
        std::memcpy(&word, at(address, 4), 4);
        return word;
    }

    // A box out of it by TMA, its rows of 64 bytes swizzled; what lies beyond the extents stays.
    void store(const Map& map, uint32_t from, const std::vector<int64_t>& to) {
        const int columns = static_cast<int>(map.box[0]), row = columns * map.bytes;
        if (row != 64 || from % 512)
            throw Stopped("a box that is stored has rows of 64 bytes, and begins at eights of them");
        check(map);
        int total = columns;
        for (int i = 1; i < map.rank; ++i) total *= static_cast<int>(map.box[i]);
        for (int i = 0; i < total; i += columns) {
            int rest = i / columns;
            bool inside = true;
            int64_t offset = to[0] * map.bytes;
            for (int d = 1; d < map.rank; ++d) {
                const int64_t place = to[d] + rest % static_cast<int>(map.box[d]);
                rest /= static_cast<int>(map.box[d]);
                inside = inside && place >= 0 && place < static_cast<int64_t>(map.extent[d]);
                offset += place * static_cast<int64_t>(map.stride[d - 1]);
            }
            for (int c = 0; inside && c < columns; ++c) {
                if (to[0] + c < 0 || to[0] + c >= static_cast<int64_t>(map.extent[0])) continue;
                uint8_t* target = static_cast<uint8_t*>(const_cast<void*>(map.base)) + offset + c * map.bytes;
                std::memcpy(target, at(mixed(from + static_cast<uint32_t>((i + c) * map.bytes), row), map.bytes),
                            map.bytes);
            }
        }
    }

    // [rows, 32] bytes with rows along K, as a descriptor says, of either swizzle.
    std::vector<uint8_t> bytes_of(uint64_t told, int rows) {
        const int row_bytes = told >> 62 == 2 ? 64 : 128;
        const auto [start, leading, eight] = fields(told, row_bytes);
        (void)leading;  // not used by this layout
        std::vector<uint8_t> made(rows * 32);
        for (int row = 0; row < rows; ++row) {
            for (int k = 0; k < 32; ++k) {
                made[row * 32 + k] = *at(mixed(start + row / 8 * eight + row % 8 * row_bytes + k, row_bytes), 1);
            }
        }
        return made;
    }

    // [rows, 16] with rows along K, as a descriptor says: eights of rows lie its second offset apart.
    std::vector<float> matrix(uint64_t told, int rows) {
        const auto [start, leading, eight] = fields(told);
        (void)leading;  // not used by this layout
        std::vector<float> made(rows * 16);
        for (int row = 0; row < rows; ++row) {
            for (int k = 0; k < 16; ++k) made[row * 16 + k] = value(start + row / 8 * eight + row % 8 * 128 + k * 2);
        }
        return made;
    }

    // [16, columns] with rows along N: 64 columns in a row, the next 64 its first offset away, the next eight rows its
    // second one.
    std::vector<float> transposed(uint64_t told, int columns) {
        const auto [start, leading, eight] = fields(told);
        std::vector<float> made(16 * columns);
        for (int k = 0; k < 16; ++k) {
            for (int c = 0; c < columns; ++c) {
                made[k * columns + c] = value(start + c / 64 * leading + c % 64 * 2 + k / 8 * eight + k % 8 * 128);
            }
        }
        return made;
    }

    static uint32_t mixed(uint32_t address, int row_bytes = 128) {
        // Sixteens of bytes change places within a row, by which of 8 rows of 128 bytes it is, or of 4 pairs of 64.
        if (row_bytes == 64) return address ^ (address / 128 % 4) * 16;
        const uint32_t row = address / 128 % 8, chunk = address / 16 % 8;
        return address - chunk * 16 + (chunk ^ row) * 16;
    }

  private:
    struct Fields {
        uint32_t start, leading, eight;
    };

    // What cuTensorMapEncodeTiled refuses.
    static void check(const Map& map) {
        if (reinterpret_cast<uintptr_t>(map.base) % 16) throw Stopped("a map begins at no multiple of 16 bytes");
        for (int i = 0; i < map.rank; ++i) {
            if (map.extent[i] < 1 || map.extent[i] > uint64_t{1} << 32) throw Stopped("an extent of a map");
            if (i && (map.stride[i - 1] % 16 || map.stride[i - 1] >= uint64_t{1} << 40)) {
                throw Stopped("a stride of a map");
            }
        }
    }

    static Fields fields(uint64_t told, int row_bytes = 128) {
        if (told >> 62 != (row_bytes == 128 ? 1 : 2) || (told >> 49 & 7)) throw Stopped("a descriptor's swizzle");
        const auto offset = [told](int bit) { return static_cast<uint32_t>(told >> bit & 0x3FFF) * 16; };
        return {offset(0), offset(16), offset(32)};
    }

    float value(uint32_t address) { return widen(word(mixed(address)), bf16_); }

    uint8_t* at(uint32_t address, int bytes) {
        if (address < base_ || address - base_ + bytes > bytes_.size()) throw Stopped("shared memory left");
        return bytes_.data() + (address - base_);
    }

    bool bf16_;
    uint32_t base_;
    std::vector<uint8_t> bytes_;
};

// Which thread of a warpgroup holds an element of wgmma's result, and as which of its values: the PTX manual's table.
struct Holder {
    int thread, value;
};
inline Holder holder(int row, int column) {
    return {row / 16 * 32 + row % 8 * 4 + column % 8 / 2, column / 8 * 4 + row % 16 / 8 * 2 + column % 2};
}
// The same of a left matrix [64, 16] in registers of two values each.
inline Holder left_holder(int row, int k) {
    return {row / 16 * 32 + row % 8 * 4 + k % 8 / 2, k / 8 * 2 + row % 16 / 8};
}

// And of a left matrix [64, 32] in registers of four.
inline Holder left_holder8(int row, int k) {
    return {row / 16 * 32 + row % 8 * 4 + k % 16 / 4, k / 16 * 2 + row % 16 / 8};
}

// Runs all, each in a thread; what stopped first stops the caller, those who waited for it come later.
template <typename Work>
void beside_each_other(int count, Work work) {
    std::string first;
    std::mutex mutex;
    std::vector<std::thread> threads;
    for (int who = 0; who < count; ++who) {
        threads.emplace_back([&first, &mutex, &work, who] {
            try {
                work(who);
            } catch (const std::exception& error) {
                const std::lock_guard<std::mutex> lock(mutex);
                if (first.empty()) first = error.what();
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    if (!first.empty()) throw Stopped(first);
}

inline void copy(const std::string& text, char* to, int room) {
    std::strncpy(to, text.c_str(), room - 1);
    to[room - 1] = 0;
}

}  // namespace emulated
