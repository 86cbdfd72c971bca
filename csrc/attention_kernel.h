// A block of attention, for any hardware: sm_90a (attention_sm90.h) or one that tests interpret on the CPU.
//
// One warpgroup is the producer: TMA loads 128 queries, and 128 keys and 128 values a step into rings of stages. Two
// warpgroups are consumers: each has 64 queries. While one makes the softmax of its scores, the other has the matrix
// units: they take turns. Within a group, the product of weights and values of a step runs behind the scores of the
// next. Sums and maxima are fp32; weights are rounded and stay in registers.
//
// What differs between 16-bit values (attention_half.h) and 8-bit ones (attention_eight.h) is a Form: kKeys of a
// step; room; registers; kCounted, whether it can take works from a counter; kBlocks of a cluster;
// load, and the row of values that goes with
// one of keys; State, what a consumer holds of a work; start, look (what is read ahead of a step), score, softmax,
// round, weigh, settle (once the last product of weights and values is there) and end (once all are); exponent and
// value_scale, the units of a row's highest score and of its sums.
//
// A hardware has wait(barrier, parity), again(barrier, parity) for a stage that this group has waited for and not
// handed back, expect(barrier, bytes), load(tensor, at, barrier, column, row, head, batch), arrive(barrier) once a
// warp, release(barrier) to all blocks of the cluster, rank() in it, share(...), a load into all of them, tell(barrier,
// number) and told() of a work, next(counter), turn(group) and pass(group); Scores, Output, Weights, Rows with
// at(thread, i); each(f), which calls f(thread) for every thread; quad_max, quad_sum over the four threads that share
// rows; address, begin(x), scores<Add>(x, a, b), values<Add>(x, weights, step, b), commit(), drain<pending>(x); max,
// exp2, log2, inverse, pack.
#pragma once

#include <cmath>

#include "attention.h"

namespace fastvid::attention {

enum Tensor : int { kQuery, kKey, kValue };

// The producer's loop over the works of a block: number, number + every, ... Those of lists are uneven: there, if
// the form is counted, a counter says which is next, for the block that is done first, and the producer tells the
// consumers.
template <typename Form, typename Hardware>
FASTVID_ANY void produce(Hardware& hw, const Attention& s, int number, int every) {
    Ring<Form::room().stages()> ring;
    uint32_t parity = 0, told = 0;
    for (const int end = static_cast<int>(works(s));;) {
        if (Form::kCounted && s.given) {
            hw.wait(barrier_of(kWorkEmpty), told ^ 1);
            hw.tell(barrier_of(kWorkFull), number);
            told ^= 1;
        }
        if (number >= end) break;
        const Work work = work_of(s, number);
        const Walk walk = walk_of(s, work, Form::kKeys);
        if (walk.steps > 0) {
            hw.wait(barrier_of(kQueryEmpty), parity ^ 1);
            Form::load(hw, kQuery, 0, barrier_of(kQueryFull), work.first, work);
            parity ^= 1;
        }
        for (int step = 0; step < walk.steps; ++step) {
            const int row = first_key(s, walk, step, Form::kKeys);
            hw.wait(barrier_of(kKeyEmpty, ring.stage), ring.parity ^ 1);
            Form::load(hw, kKey, Form::room().keys_at(ring.stage), barrier_of(kKeyFull, ring.stage), row, work);
            hw.wait(barrier_of(kValueEmpty, ring.stage), ring.parity ^ 1);
            Form::load(hw, kValue, Form::room().values_at(ring.stage), barrier_of(kValueFull, ring.stage),
                       Form::value_row(row), work);
            ring = ring.next();
        }
        number = Form::kCounted && s.given ? every + hw.next(s.given) : number + every;
    }
}

// Where nothing is listed, scores that are no keys' become -inf.
template <int Keys, typename Hardware>
FASTVID_ANY void mask(Hardware& hw, typename Hardware::Scores& scores, int count) {
    if (count >= Keys) return;
    hw.each([&](int thread) {
        FASTVID_UNROLL
        for (int i = 0; i < Keys / 2; ++i) {
            if (column_of(thread, i / 4) + i % 2 >= count) scores.at(thread, i) = -INFINITY;
        }
    });
}

// The highest of a thread's scores in one of its rows. Four run beside each other: a maximum waits for the one before
// it.
template <int Keys, typename Hardware>
FASTVID_ANY float highest_score(Hardware& hw, typename Hardware::Scores& scores, int thread, int half) {
    constexpr int kChains = 4;
    float most[kChains];
    FASTVID_UNROLL
    for (int i = 0; i < Keys / 8; ++i) {
        const int at = i * 4 + half * 2;
        const float pair = hw.max(scores.at(thread, at), scores.at(thread, at + 1));
        most[i % kChains] = i < kChains ? pair : hw.max(most[i % kChains], pair);
    }
    return hw.max(hw.max(most[0], most[1]), hw.max(most[2], most[3]));
}

// out [B, N, H, D] and, if there is one, lse [B, H, N]; without any keys 0 and -inf.
template <typename Form, typename Hardware>
FASTVID_ANY void store(Hardware& hw, const Attention& s, const Work& work, int group, bool nothing,
                       typename Form::template State<Hardware>& state, uint16_t* out, float* lse) {
    constexpr int D = Form::kHeadDim;
    const float unit = Form::value_scale(hw, state);
    hw.quad_sum(state.total);
    hw.each([&](int thread) {
        FASTVID_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int query = work.first + group * (kQueries / kGroups) + row_of(thread, half);
            if (query >= work.end) continue;
            const int64_t token = (int64_t{1} * work.batch * s.queries + query) * s.heads + work.head;
            uint32_t* to = reinterpret_cast<uint32_t*>(out + token * D + column_of(thread, 0));
            const float sum = state.total.at(thread, half), inverse = nothing ? 0.0f : unit * hw.inverse(sum);
            FASTVID_UNROLL
            for (int i = 0; i < D / 8; ++i) {
                const int at = i * 4 + half * 2;
                to[i * 4] = hw.pack(state.output.at(thread, at) * inverse, state.output.at(thread, at + 1) * inverse);
            }
            if (lse && thread % 4 == 0) {
                constexpr float kLog2 = 0.693147180559945309f;
                const int64_t at = (int64_t{1} * work.batch * s.heads + work.head) * s.queries + query;
                const float exponent = Form::exponent(s, at, state.highest.at(thread, half));
                lse[at] = nothing ? -INFINITY : (exponent + hw.log2(sum)) * kLog2;
            }
        }
    });
}

// One work of a consumer. The ring goes on from work to work.
template <typename Form, typename Hardware>
FASTVID_ANY void attend(Hardware& hw, const Attention& s, const Work& work, const Walk& walk, int group,
                        Ring<Form::room().stages()>& ring, typename Form::template State<Hardware>& state) {
    Form::look(hw, s, work, walk, 0, state);
    hw.wait(barrier_of(kKeyFull, ring.stage), ring.parity);
    hw.turn(group);
    Form::score(hw, state, group, ring.stage);
    hw.pass(group);
    hw.template drain<0>(state.scored());
    hw.release(barrier_of(kKeyEmpty, ring.stage));
    if (walk.steps == 1) hw.arrive(barrier_of(kQueryEmpty));
    Form::softmax(hw, s, key_count(s, walk, 0, Form::kKeys), state);
    Form::round(hw, state);
    for (int step = 1; step < walk.steps; ++step) {
        const Ring<Form::room().stages()> next = ring.next();
        Form::look(hw, s, work, walk, step, state);
        hw.wait(barrier_of(kValueFull, ring.stage), ring.parity);
        hw.wait(barrier_of(kKeyFull, next.stage), next.parity);
        hw.turn(group);
        Form::score(hw, state, group, next.stage);
        Form::weigh(hw, state, ring.stage);
        hw.pass(group);
        hw.template drain<1>(state.scored());
        hw.release(barrier_of(kKeyEmpty, next.stage));
        if (step + 1 == walk.steps) hw.arrive(barrier_of(kQueryEmpty));
        Form::softmax(hw, s, key_count(s, walk, step, Form::kKeys), state);
        hw.again(barrier_of(kValueFull, ring.stage), ring.parity);  // so the softmax stays above
        hw.template drain<0>(state.weighed());
        hw.release(barrier_of(kValueEmpty, ring.stage));
        Form::settle(hw, state);
        Form::round(hw, state);
        ring = next;
    }
    hw.wait(barrier_of(kValueFull, ring.stage), ring.parity);
    Form::weigh(hw, state, ring.stage);
    hw.template drain<0>(state.weighed());
    hw.release(barrier_of(kValueEmpty, ring.stage));
    Form::end(hw, state);
    ring = ring.next();
}

// A consumer's loop over the works of a block. The first group begins; at the end it takes the turn that is left.
template <typename Form, typename Hardware>
FASTVID_ANY void consume(Hardware& hw, const Attention& s, int group, int number, int every, uint16_t* out,
                         float* lse) {
    Ring<Form::room().stages()> ring;
    uint32_t parity = 0, heard = 0;
    if (group == 1) hw.pass(group);
    for (const int end = static_cast<int>(works(s));; number += every) {
        if (Form::kCounted && s.given) {
            hw.wait(barrier_of(kWorkFull), heard);
            number = hw.told();
            hw.arrive(barrier_of(kWorkEmpty));
            heard ^= 1;
        }
        if (number >= end) break;
        const Work work = work_of(s, number);
        const Walk walk = walk_of(s, work, Form::kKeys);
        if (work.first >= work.end) continue;
        typename Form::template State<Hardware> state;
        Form::start(hw, s, work, group, state);
        hw.each([&](int thread) {
            FASTVID_UNROLL
            for (int i = 0; i < Form::kHeadDim / 2; ++i) state.output.at(thread, i) = 0;
            FASTVID_UNROLL
            for (int half = 0; half < 2; ++half) {
                state.highest.at(thread, half) = -INFINITY;
                state.total.at(thread, half) = 0;
            }
        });
        if (walk.steps > 0) {
            hw.wait(barrier_of(kQueryFull), parity);
            parity ^= 1;
            attend<Form>(hw, s, work, walk, group, ring, state);
        }
        store<Form>(hw, s, work, group, walk.steps == 0, state, out, lse);
    }
    if (group == 0) hw.turn(group);
}

}  // namespace fastvid::attention
