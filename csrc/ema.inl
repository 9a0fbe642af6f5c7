// The weight average, thirty-two weights at a time, compiled for each instruction set by ema.cpp.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
//
// Included inside a namespace. Formulas: advgame_kernels/ema.py and ema_bf16.py. No product is fused with the addition after it
// (ema.cpp sees to that), so that results are those of the plain torch code to the last bit; only random bits are other ones.

#include "lanes.inl"

enum Rounding { kPlain, kAtRandom, kKept };

static inline U mixed(U x) {  // murmur3's finaliser: every bit of x reaches every bit of the result
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

// 16 random bits for each of sixteen weights in a row, from their numbers in the model and the keys alone: the same whatever
// the threads, the instruction set and the place where a block begins.
static inline U noise(uint64_t number, const uint32_t* keys) {
    const U low = U{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (uint32_t)number;
    const U high = (uint32_t)(number >> 32) - (U)(low < (uint32_t)number);  // a comparison that holds is −1
    return mixed(mixed(low ^ keys[0]) ^ (keys[1] + high * 0x9e3779b9u)) >> 16;
}

static inline F wide(H x) { return (F)(__builtin_convertvector(x, U) << 16); }

// Up or down to a neighbour in bfloat16, with expectation x; infinities and NaNs stay.
static inline F at_random(F x, U bits) {
    const U finite = (U)(((U)x & 0x7f800000u) != 0x7f800000u);
    const U rounded = ((U)x + bits) & 0xffff0000u;
    return wide(narrow((F)((rounded & finite) | ((U)x & ~finite))));
}

// The hardware's prefetch stops at every page, so it is asked for the next one: 4 KiB ahead of two lines of `p`.
constexpr int kPage = 4096;

template <class T>
static inline void prefetch(const T* p) {
    __builtin_prefetch((const char*)p + kPage);
    if (sizeof(T) == 4) __builtin_prefetch((const char*)p + kPage + 64);
}

// The new average of n weights from number j on; it is stored, and returned as it was stored.
template <Rounding rounding, class P>
static inline F averaged(const EmaTensor& job, int64_t j, int n, const EmaCall& call) {
    const F p = load_some((const P*)job.param + j, n, 0.0f);
    if (rounding == kPlain) {
        float* shadow = (float*)job.shadow + j;
        F s = load_some(shadow, n, 0.0f);
        s = s + (p - s) * call.step;
        store_some(shadow, s, n);
        return s;
    }
    uint16_t* shadow = (uint16_t*)job.shadow + j;
    F s = load_some(shadow, n, 0.0f);
    if (rounding == kKept) s = s + load_some(job.kept + j, n, 0.0f);
    s = s + (p - s) * call.step;
    const F stored = rounding == kKept ? wide(narrow(s)) : at_random(s, noise((uint64_t)(job.first + j), call.keys));
    store_some(shadow, stored, n);
    if (rounding == kKept) store_some(job.kept + j, s - stored, n);
    return stored;
}

template <Rounding rounding, class P, class Q>
static void ema_of(const EmaTensor& job, int64_t begin, int64_t end, const EmaCall& call) {
    Q* publish = (Q*)job.publish;
    for (int64_t j = begin; j < end; j += kLanes) {
        const int n = (int)(end - j < kLanes ? end - j : kLanes);
        const F s = averaged<rounding, P>(job, j, n, call);
        if (publish) store_some(publish + j, s, n);
    }
}

// Past the caches, for what nobody reads soon: a line need not be fetched in order to be overwritten. A whole line at `p`.
static inline void stream(uint16_t* p, F one, F two) {
    const H halves[2] = {narrow(one), narrow(two)};
#ifdef ADVGAME_AVX512
    __m512i line;
    __builtin_memcpy(&line, halves, sizeof line);
    _mm512_stream_si512((__m512i*)p, line);
#elif defined(ADVGAME_AVX2)
    _mm256_stream_si256((__m256i*)p, (__m256i)halves[0]);
    _mm256_stream_si256((__m256i*)p + 1, (__m256i)halves[1]);
#else
    __builtin_memcpy(p, halves, sizeof halves);
#endif
}

// The usual case, a large tensor with a bfloat16 copy, without reading the copy's old lines: 14 bytes a parameter and not 16.
template <Rounding rounding, class P>
static void ema_streamed(const EmaTensor& job, int64_t begin, int64_t end, const EmaCall& call) {
    constexpr int64_t line = 2 * kLanes;
    uint16_t* publish = (uint16_t*)job.publish;
    int64_t first = begin;
    while (first < end && (uintptr_t)(publish + first) % 64) ++first;
    const int64_t last = first + (end - first) / line * line;
    ema_of<rounding, P, uint16_t>(job, begin, first, call);
    for (int64_t j = first; j < last; j += line) {
        prefetch((const P*)job.param + j);
        rounding == kPlain ? prefetch((const float*)job.shadow + j) : prefetch((const uint16_t*)job.shadow + j);
        if (rounding == kKept) prefetch(job.kept + j);
        const F one = averaged<rounding, P>(job, j, kLanes, call), two = averaged<rounding, P>(job, j + kLanes, kLanes, call);
        stream(publish + j, one, two);
    }
    ema_of<rounding, P, uint16_t>(job, last, end, call);
#if defined(ADVGAME_AVX512) || defined(ADVGAME_AVX2)
    _mm_sfence();
#endif
}

template <Rounding rounding, class P>
static void ema_of_params(const EmaTensor& job, int64_t begin, int64_t end, const EmaCall& call) {
    constexpr int64_t large = 1 << 20;  // elements: below, the copy may well be read from a cache
    if (job.publish_dtype == kFloat32)
        ema_of<rounding, P, float>(job, begin, end, call);
    else if (job.publish && job.numel >= large)
        ema_streamed<rounding, P>(job, begin, end, call);
    else
        ema_of<rounding, P, uint16_t>(job, begin, end, call);
}

template <Rounding rounding>
static void ema_rounded(const EmaTensor& job, int64_t begin, int64_t end, const EmaCall& call) {
    job.param_dtype == kBFloat16 ? ema_of_params<rounding, uint16_t>(job, begin, end, call)
                                 : ema_of_params<rounding, float>(job, begin, end, call);
}

void ema(const EmaTensor& job, int64_t begin, int64_t end, const EmaCall& call) {
    if (job.shadow_dtype == kFloat32)
        ema_rounded<kPlain>(job, begin, end, call);
    else
        job.kept ? ema_rounded<kKept>(job, begin, end, call) : ema_rounded<kAtRandom>(job, begin, end, call);
}
