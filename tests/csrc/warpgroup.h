// A warpgroup of an emulated block: which stages it may fill or read, which registers are its own, and the products
// that run behind it. A mistake is told where it is made, not only where it happens to change a result: a stage that
// was not waited for, or is handed back while a product reads it, registers that are touched under a product, or
// without a fence before one.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>

#include "emulated.h"

namespace emulated {

// What the warpgroups of a block share. Barriers come in pairs: 2 i ends its phases when the bytes of a stage have
// come, 2 i + 1 when all who read them are done.
struct Block {
    Block(uint32_t base, int bytes, bool bf16, const std::vector<int>& arrivals)
        : base(base), memory(base, bytes, bf16), owners((bytes + kPiece - 1) / kPiece) {
        for (const int one : arrivals) made.emplace_back(new Barrier(one));
        for (auto& owner : owners) owner = -1;
    }
    void check_rest() {
        for (auto& barrier : made) {
            if (!barrier->at_rest()) throw Stopped("a barrier is left in the middle of a phase");
        }
    }
    // The pair of barriers that this address was loaded for.
    std::atomic<int>& owner(uint32_t address) {
        const uint32_t piece = (address - base) / kPiece;
        if (address < base || piece >= owners.size()) throw Stopped("shared memory left");
        return owners[piece];
    }

    static constexpr uint32_t kPiece = 1024;
    uint32_t base;
    Memory memory;
    std::vector<std::unique_ptr<Barrier>> made;
    std::vector<std::atomic<int>> owners;
};

// Whether products use registers, and whether they were touched since the last fence.
struct Held {
    int running = 0;
    mutable bool touched = true;
    void touch() const {
        if (running) throw Stopped("registers are touched that a product uses");
        touched = true;
    }
};

// Of the 128 threads. Products use `value`.
template <typename T, int Count>
struct Registers : Held {
    T value[128][Count];
    Registers() { std::memset(value, 0xFF, sizeof value); }  // NaN
    T& at(int thread, int i) {
        touch();
        return value[thread][i];
    }
    const T& at(int thread, int i) const {
        touch();
        return value[thread][i];
    }
};

class Warpgroup {
  public:
    explicit Warpgroup(Block& block) : block_(block), waits_(block.made.size()), done_(block.made.size()) {}

    void wait(int i, uint32_t parity) {
        // What reads waits for as many phases as there were fills; who fills needs no one the first time.
        const int ended = static_cast<int>(block_.made[i]->wait(parity));
        if (ended != ++waits_[i] - i % 2) throw Stopped("a barrier was passed in a wrong round");
    }
    // Once more, for a stage that was waited for and is not handed back: no later fill can have come.
    void again(int i, uint32_t parity) {
        if (waits_[i] != done_[i ^ 1] + 1) throw Stopped("a stage is waited for again that is not held");
        if (static_cast<int>(block_.made[i]->wait(parity)) != waits_[i])
            throw Stopped("a barrier passed in a wrong round");
    }
    void expect(int i, int bytes) {
        pass_on(i);
        block_.made[i]->arrive(bytes);
    }
    // By its four warps.
    void hand_back(int i) {
        if (any_reads(i / 2)) throw Stopped("a stage is handed back while a product reads it");
        pass_on(i);
        for (int warp = 0; warp < 4; ++warp) block_.made[i]->arrive();
    }
    void load_box(const Map& map, uint32_t to, int i, const std::vector<int64_t>& from) {
        load_into(block_, map, to, i, from);
    }
    // Into a block of the cluster, as soon as it may come.
    static void load_into(Block& block, const Map& map, uint32_t to, int i, const std::vector<int64_t>& from) {
        const int bytes = block.memory.load(map, to, from);
        for (int at = 0; at < bytes; at += Block::kPiece) block.owner(to + static_cast<uint32_t>(at)) = i / 2;
        block.made[i]->complete(bytes);
    }

    template <typename Function>
    void each(Function function) {
        for (int thread = 0; thread < 128; ++thread) function(thread);
    }

    void begin(const Held& registers) { registers.touched = false; }
    void commit() {
        groups_.push_back(std::move(open_));
        open_.clear();
    }
    // Products are made as late as wgmma may make them: when they are waited for, from what memory and registers hold
    // then.
    void finish(size_t pending) {
        while (groups_.size() > pending) {
            for (const Product& product : groups_.front()) {
                product.make();
                for (Held* one : product.registers) --one->running;
            }
            groups_.erase(groups_.begin());
        }
    }

  protected:
    // A product of what descriptors show, and of registers.
    void later(const std::vector<uint64_t>& told, const std::vector<Held*>& registers, std::function<void()> make) {
        Product product = {{}, registers, std::move(make)};
        for (const uint64_t one : told) {
            const int pair = block_.owner(static_cast<uint32_t>(one & 0x3FFF) * 16);
            if (!holds(pair)) throw Stopped("a product reads a stage that was not waited for");
            product.stages.push_back(pair);
        }
        for (Held* one : registers) {
            if (one->touched) throw Stopped("a product without a fence behind what touched its registers");
            ++one->running;
        }
        open_.push_back(std::move(product));
    }
    // Whether a stage was waited for and is not handed back; the same by an address in it.
    bool holds(int pair) const { return pair >= 0 && waits_[2 * pair] != done_[2 * pair + 1]; }
    void check_held(uint32_t address) {
        if (!holds(block_.owner(address))) throw Stopped("a stage is read that was not waited for");
    }

    // Four matrices of 8 x 8 values for each warp (ldmatrix, stmatrix): 8 threads have the addresses of one's rows; a
    // thread gets or gives two neighbours of row thread / 4 of each. address: of a thread.
    template <typename Address, typename Function>
    void each_word(Address address, Function function) {
        for (int thread = 0; thread < 128; ++thread) {
            for (int i = 0; i < 4; ++i) {
                const uint32_t row = address(thread / 32 * 32 + i * 8 + thread % 32 / 4);
                if (row % 16) throw Stopped("a row of a matrix begins at no multiple of 16 bytes");
                function(thread, i, row + thread % 4 * 4);
            }
        }
    }
    Memory& memory() { return block_.memory; }
    const Memory& memory() const { return block_.memory; }

    // From who fills to who reads, and back: each time once, after a wait for the other.
    void pass_on(int i) {
        if (++done_[i] != waits_[i ^ 1]) throw Stopped("a stage is passed on by who did not wait for it");
    }

  private:
    struct Product {
        std::vector<int> stages;
        std::vector<Held*> registers;
        std::function<void()> make;
    };

    bool any_reads(int pair) const {
        const auto reads = [pair](const Product& product) {
            return std::find(product.stages.begin(), product.stages.end(), pair) != product.stages.end();
        };
        const auto some = [reads](const std::vector<Product>& group) {
            return std::any_of(group.begin(), group.end(), reads);
        };
        return some(open_) || std::any_of(groups_.begin(), groups_.end(), some);
    }

    Block& block_;
    std::vector<int> waits_, done_;  // of each barrier: waits for it, arrivals at it
    std::vector<Product> open_;
    std::vector<std::vector<Product>> groups_;
};

}  // namespace emulated
