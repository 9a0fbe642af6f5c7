// The tensors of the extension: plain addresses with a dtype code, as advgame_kernels/native.py passes them.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

enum DType : int { kFloat32 = 0, kBFloat16 = 1 };

// One chunk of logits and the per-row arrays around it. Unused arrays are null.
struct Rows {
    void* logits;             // (rows, vocab), row stride in elements
    DType dtype;              // of the logits
    void* grads;              // (rows, vocab), the same memory or another
    DType grad_dtype;
    int64_t vocab, stride, grad_stride;
    const int64_t* labels;    // (rows,)
    double inv_temperature;
    float softcap;
    float *logps, *entropy;                            // (rows,) written by stats, read by grads
    double* lse;                                       // (rows,) likewise; float would put its rounding into every gradient
    const float *d_logps, *d_entropy, *d_lse;          // (rows,) upstream gradients
};

// One tensor of a weight average. A bfloat16 shadow without `kept` is rounded at random.
struct EmaTensor {
    void* shadow;
    DType shadow_dtype;
    const void* param;
    DType param_dtype;
    void* publish;            // null: nothing to publish
    DType publish_dtype;
    uint16_t* kept;           // what rounding has dropped so far; null: nothing is kept
    int64_t numel;
    int64_t first;            // number of its first element in the whole model
};

// What all tensors of one update share.
struct EmaCall {
    float step;
    uint32_t keys[2];         // of the random bits
};

// The compiled forms of the inner loops for one instruction set.
struct Kernels {
    const char* name;
    void (*row_stats)(const Rows&, int64_t begin, int64_t end);
    void (*row_grads)(const Rows&, int64_t begin, int64_t end);
    void (*ema)(const EmaTensor&, int64_t begin, int64_t end, const EmaCall&);
    uint64_t (*byte_sum)(const uint8_t* data, int64_t begin, int64_t end);
};
