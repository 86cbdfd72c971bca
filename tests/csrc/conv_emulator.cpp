// The convolution's kernel on the CPU: conv_kernel.h over a hardware that does what TMA, mbarriers and wgmma are
// specified to do, from the very coordinates, tensor maps and descriptors that a GPU would be given. The producer and
// both consumer warpgroups are threads, so that a ring which hands out a stage too early or never is seen.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "conv_call.h"
#include "conv_kernel.h"
#include "vae_norm.h"

using namespace fastvid::conv;

namespace {

float widen(uint16_t bits, bool bf16) {
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

uint16_t narrow(float value, bool bf16) {
    uint16_t bits;
    if (bf16) {
        uint32_t word;
        std::memcpy(&word, &value, 4);
        return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
    }
    const _Float16 half = static_cast<_Float16>(value);
    std::memcpy(&bits, &half, 2);
    return bits;
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

    void wait(uint32_t parity) {
        std::unique_lock<std::mutex> lock(mutex_);
        const bool ended = changed_.wait_for(lock, std::chrono::seconds(20), [&] { return (phase_ & 1) != parity; });
        if (!ended) throw Stopped("a barrier was waited for in vain");
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

template <int N>
class Emulated {
  public:
    struct Accumulators {
        float value[128][N / 2] = {};
        std::vector<std::vector<std::pair<uint64_t, uint64_t>>> groups;  // committed products, in order
        std::vector<std::pair<uint64_t, uint64_t>> open;
        float at(int thread, int i) const { return value[thread][i]; }
    };

    // base: where shared memory begins, so that addresses are not small by chance.
    Emulated(const Map& x, const Map& past, const Map& weights, bool bf16, uint32_t base)
        : maps_{x, past, weights}, bf16_(bf16), base_(base), memory_(stages(N) * stage_bytes(N), 0x7F) {
        for (int i = 0; i < stages(N); ++i) {
            full_.emplace_back(new Barrier(1));
            empty_.emplace_back(new Barrier(kConsumers));
        }
    }
    ~Emulated() {
        for (Barrier* barrier : full_) delete barrier;
        for (Barrier* barrier : empty_) delete barrier;
    }

    void wait_empty(int stage, uint32_t parity) { empty_[stage]->wait(parity); }
    void wait_full(int stage, uint32_t parity) { full_[stage]->wait(parity); }
    void expect(int stage, int bytes) { full_[stage]->arrive(bytes); }
    void release(int stage) {
        for (int warp = 0; warp < kConsumers / 2; ++warp) empty_[stage]->arrive();
    }
    uint32_t address(int stage) const { return base_ + stage * stage_bytes(N); }

    void load_pixels(int stage, int from_past, int c, int w, int h, int t, int b) {
        load(maps_[from_past ? 1 : 0], stage, address(stage), {c, w, h, t, b});
    }
    void load_weights(int stage, int c, int tap, int n) {
        load(maps_[2], stage, address(stage) + kPixelBytes, {c, tap, n, 0, 0});
    }

    // Products are made as late as wgmma may make them: when they are waited for. What is read too late by that
    // measure may have been overwritten.
    void begin(Accumulators& acc) { acc.open.clear(); }
    void mma(Accumulators& acc, uint64_t a, uint64_t b) { acc.open.emplace_back(a, b); }
    void commit(Accumulators& acc) { acc.groups.push_back(std::move(acc.open)); }
    template <int Pending>
    void drain(Accumulators& acc) {
        while (acc.groups.size() > Pending) {
            for (const auto& [a, b] : acc.groups.front()) multiply_now(acc, a, b);
            acc.groups.erase(acc.groups.begin());
        }
    }

    void unpack(uint32_t word, float& x, float& y) const {
        x = widen(static_cast<uint16_t>(word), bf16_);
        y = widen(static_cast<uint16_t>(word >> 16), bf16_);
    }
    uint32_t pack(float x, float y) const { return narrow(x, bf16_) | uint32_t{narrow(y, bf16_)} << 16; }

  private:
    // wgmma m64nNk16, both matrices with rows along K in shared memory, as their descriptors say.
    void multiply_now(Accumulators& acc, uint64_t a, uint64_t b) {
        const std::vector<float> left = matrix(a, 64), right = matrix(b, N);
        std::vector<float> across(kDepth * N), sum(N);
        for (int i = 0; i < kDepth * N; ++i) across[i] = right[i % N * kDepth + i / N];
        for (int row = 0; row < 64; ++row) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int k = 0; k < kDepth; ++k) {
                for (int col = 0; col < N; ++col) sum[col] += left[row * kDepth + k] * across[k * N + col];
            }
            for (int col = 0; col < N; ++col) {
                // The table of the PTX manual, from the element to who holds it.
                const int thread = row / 16 * 32 + row % 8 * 4 + col % 8 / 2;
                acc.value[thread][col / 8 * 4 + row % 16 / 8 * 2 + col % 2] += sum[col];
            }
        }
    }

    uint8_t* at(uint32_t address) {
        if (address < base_ || address - base_ + kBytes > memory_.size()) throw Stopped("shared memory left");
        return memory_.data() + (address - base_);
    }

    static uint32_t mixed(uint32_t address) {
        // Sixteens of bytes change places within 128, by which of 8 rows it is.
        const uint32_t row = address / 128 % 8, chunk = address / 16 % 8;
        return address - chunk * 16 + (chunk ^ row) * 16;
    }

    void load(const Map& map, int stage, uint32_t to, const std::vector<int64_t>& from) {
        if (to % 1024) throw Stopped("a swizzled box begins at no multiple of 1,024");
        if (map.box[0] * kBytes != kRow) throw Stopped("a swizzled box has rows of 128 bytes");
        uint32_t count[5] = {1, 1, 1, 1, 1};
        int total = 1;
        for (int i = 0; i < map.rank; ++i) {
            if (map.box[i] > 256) throw Stopped("a box has at most 256 elements a side");
            count[i] = (map.box[i] + map.every[i] - 1) / map.every[i];
            total *= static_cast<int>(count[i]);
        }
        for (int i = 0; i < total; i += kChannels) {
            int rest = i / kChannels;
            bool inside = true;
            int64_t offset = from[0] * kBytes;
            for (int d = 1; d < map.rank; ++d) {
                const int64_t place = from[d] + static_cast<int64_t>(rest % count[d]) * map.every[d];
                rest /= static_cast<int>(count[d]);
                inside = inside && place >= 0 && place < static_cast<int64_t>(map.extent[d]);
                offset += place * static_cast<int64_t>(map.stride[d - 1]);
            }
            for (int c = 0; c < kChannels; ++c) {
                uint8_t* target = at(mixed(to + static_cast<uint32_t>(i + c) * kBytes));
                const bool real = inside && from[0] + c >= 0 && from[0] + c < static_cast<int64_t>(map.extent[0]);
                if (real) std::memcpy(target, static_cast<const uint8_t*>(map.base) + offset + c * kBytes, kBytes);
                if (!real) std::memset(target, 0, kBytes);
            }
        }
        full_[stage]->complete(total * kBytes);
    }

    std::vector<float> matrix(uint64_t told, int rows) {
        const uint32_t start = static_cast<uint32_t>(told & 0x3FFF) * 16;
        const uint32_t eight = static_cast<uint32_t>(told >> 32 & 0x3FFF) * 16;
        if (told >> 62 != 1 || (told >> 49 & 7)) throw Stopped("the descriptor is not of the 128-byte swizzle");
        std::vector<float> made(rows * kDepth);
        for (int row = 0; row < rows; ++row) {
            for (int k = 0; k < kDepth; ++k) {
                uint16_t bits;
                std::memcpy(&bits, at(mixed(start + row / 8 * eight + row % 8 * 128 + k * kBytes)), kBytes);
                made[row * kDepth + k] = widen(bits, bf16_);
            }
        }
        return made;
    }

    Map maps_[3];
    bool bf16_;
    uint32_t base_;
    std::vector<uint8_t> memory_;
    std::vector<Barrier*> full_, empty_;
};

template <int N>
void run(const Call& call, const void* x, const void* past, const void* weight, const void* bias, void* out,
         bool bf16) {
    const Conv s = conv_of(call);
    const Map now = map_of_pixels(call, s, x, call.x[2], call.x_strides);
    const Map before = call.past ? map_of_pixels(call, s, past, call.history, call.past_strides) : now;
    const Map weights = map_of_weights(call, s, weight, N);
    for (int64_t number = 0; number < blocks(s, N); ++number) {
        const Tile tile = tile_of(s, N, number);
        Emulated<N> hw(now, before, weights, bf16, 1024 * (1 + number % 3));
        std::string wrong[3];
        const auto guarded = [&wrong](int who, auto work) {
            return std::thread([&wrong, who, work] {
                try {
                    work();
                } catch (const std::exception& error) {
                    wrong[who] = error.what();
                }
            });
        };
        std::vector<std::thread> threads;
        threads.push_back(guarded(2, [&] { produce<N>(hw, s, tile); }));
        for (int group = 0; group < 2; ++group) {
            threads.push_back(guarded(group, [&hw, &s, &tile, group, bias, out] {
                auto acc = std::make_unique<typename Emulated<N>::Accumulators>();
                consume<N>(hw, *acc, s, tile, group);
                for (int thread = 0; thread < 128; ++thread) {
                    store<N>(hw, *acc, s, tile, group, thread, static_cast<const uint16_t*>(bias),
                             static_cast<uint16_t*>(out));
                }
            }));
        }
        for (std::thread& thread : threads) thread.join();
        for (const std::string& one : wrong) {
            if (!one.empty()) throw Stopped(one);
        }
    }
}

void copy(const std::string& text, char* to, int room) {
    std::strncpy(to, text.c_str(), room - 1);
    to[room - 1] = 0;
}

}  // namespace

extern "C" {

// 0, or 1 with the reason in `why`. width: 0 chooses it.
int conv_emulate(const Call* call, const void* x, const void* past, const void* weight, const void* bias, void* out,
                 int bf16, int width, char* why, int room) {
    try {
        const std::string reason = refuse(*call, x, past, weight, bias, out);
        if (!reason.empty()) throw Stopped(reason);
        switch (width ? width : choose_width(static_cast<int>(outputs_of(*call)))) {
            case 96:
                run<96>(*call, x, past, weight, bias, out, bf16);
                break;
            case 128:
                run<128>(*call, x, past, weight, bias, out, bf16);
                break;
            case 192:
                run<192>(*call, x, past, weight, bias, out, bf16);
                break;
            default:
                throw Stopped("no such width");
        }
    } catch (const std::exception& error) {
        copy(error.what(), why, room);
        return 1;
    }
    return 0;
}

int conv_call_words() {
    return sizeof(Call) / sizeof(int64_t);
}
int conv_width(int outputs) {
    return choose_width(outputs);
}
int conv_tile_w(int height, int width) {
    return choose_tile_w(height, width);
}
int conv_stages(int width) {
    return stages(width);
}
int conv_smem(int width) {
    return smem_bytes(width);
}
// Offset that a pixel of a launch is stored at, -1 beyond the border; which tile makes it is told in `tile`.
int64_t conv_offset(const Call* call, int width, int64_t number, int pixel, int* tile) {
    const Conv s = conv_of(*call);
    const Tile made = tile_of(s, width, number);
    std::memcpy(tile, &made, sizeof made);
    return offset_of(s, made, pixel);
}
int64_t conv_blocks(const Call* call, int width) {
    return blocks(conv_of(*call), width);
}
uint64_t conv_descriptor(uint32_t address) {
    return descriptor(address);
}
uint32_t conv_swizzled(uint32_t address) {
    return swizzled(address);
}

// RMS norm with every pixel's lanes one after the other; sums over them are made first.
int norm_emulate(const fastvid::norm::Norm* s, const uint16_t* x, const uint16_t* gamma, uint16_t* out, int bf16,
                 char* why, int room) {
    namespace norm = fastvid::norm;
    struct {
        bool bf16;
        void unpack(uint32_t word, float& a, float& b) const {
            a = widen(static_cast<uint16_t>(word), bf16);
            b = widen(static_cast<uint16_t>(word >> 16), bf16);
        }
        uint32_t pack(float a, float b) const { return narrow(a, bf16) | uint32_t{narrow(b, bf16)} << 16; }
    } words{bf16 != 0};
    const std::string reason = norm::refuse(*s, x, gamma, out);
    if (!reason.empty()) {
        copy(reason, why, room);
        return 1;
    }
    const int lanes = norm::lanes_of(s->channels);
    for (int64_t pixel = 0; pixel < norm::pixels(*s) + 3; ++pixel) {  // a few beyond the end, as a grid has
        float total = 0;
        std::vector<uint16_t> spare(s->channels);  // what is written before the sum is known
        norm::Norm apart = *s;
        apart.out[0] = apart.out[1] = apart.out[2] = apart.out[3] = 0;
        for (int lane = 0; lane < lanes; ++lane) {
            norm::run(words, apart, x, gamma, spare.data(), pixel, lane, lanes,
                      [&](float part) { return total += part; });
        }
        for (int lane = 0; lane < lanes; ++lane) {
            norm::run(words, *s, x, gamma, out, pixel, lane, lanes, [&](float) { return total; });
        }
    }
    return 0;
}

int norm_lanes(int channels) {
    return fastvid::norm::lanes_of(channels);
}
}
