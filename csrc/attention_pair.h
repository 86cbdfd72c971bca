// Between attention.cu, which is called, and attention_pair.cu.
#pragma once

#include "attention_call.h"

namespace fastvid::attention {

struct Tensors {
    const void *q, *k, *v;
    void* out;
    float* lse;
};

// What `paired` is true of; a cudaError_t.
int attend_pairs(const Call& call, float scale, const Tensors& at, bool bf16, int device, void* stream);

}  // namespace fastvid::attention
