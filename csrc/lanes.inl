// Sixteen floats at a time: loads, stores and conversions that all inner loops share.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
//
// Included inside a namespace, after the standard headers. GCC's and clang's vector types become AVX-512 registers, pairs of
// AVX2 or quadruples of SSE registers.

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
constexpr int kLanes = 16;

static inline F splat(float x) { return F{} + x; }

static inline F load(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

static inline F load(const uint16_t* p) {
    H raw;
    __builtin_memcpy(&raw, p, sizeof raw);
    return (F)(__builtin_convertvector(raw, U) << 16);
}

static inline void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }

static inline H narrow(F x) {
    const U bits = (U)x;
    // Round to nearest even by adding half an ulp, less one when the kept part is even; a NaN stays a NaN.
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U quiet = (bits >> 16) | 0x40u;
    const U kept = (U)(x == x);
    return __builtin_convertvector((rounded & kept) | (quiet & ~kept), H);
}

static inline void store(uint16_t* p, F x) {
    const H out = narrow(x);
    __builtin_memcpy(p, &out, sizeof out);
}

static inline float widen(float x) { return x; }

static inline float widen(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float out;
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
}

// A partial block at the end of a row: missing lanes are `fill` on the way in and are not written on the way out.
template <class T>
static inline F load_some(const T* p, int n, float fill) {
    if (n == kLanes) return load(p);
    F x = splat(fill);
    for (int i = 0; i < n; ++i) x[i] = widen(p[i]);
    return x;
}

template <class T>
static inline void store_some(T* p, F x, int n) {
    if (n == kLanes) {
        store(p, x);
        return;
    }
    T whole[kLanes];
    store(whole, x);
    for (int i = 0; i < n; ++i) p[i] = whole[i];
}
