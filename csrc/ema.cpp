// Compiles the weight average for each instruction set, without fused multiply-add.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#else
#pragma STDC FP_CONTRACT OFF
#endif

namespace generic {
#include "ema.inl"
}  // namespace generic

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define ADVGAME_AVX2 1  // g++ sets its own macros by the command line alone, whatever the pragma says
namespace avx2 {
#include "ema.inl"
}  // namespace avx2
#undef ADVGAME_AVX2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define ADVGAME_AVX512 1
namespace avx512 {
#include "ema.inl"
}  // namespace avx512
#undef ADVGAME_AVX512
#pragma GCC pop_options
#endif
