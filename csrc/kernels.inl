// The inner loops, sixteen floats at a time, written once and compiled for each instruction set by isa.cpp.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
//
// Included inside a namespace, after the standard headers. GCC's and clang's vector types become AVX-512 registers, pairs of
// AVX2 or quadruples of SSE registers. Formulas: advgame_kernels/passes_torch.py.

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

static inline void store(uint16_t* p, F x) {
    const U bits = (U)x;
    // Round to nearest even by adding half an ulp, less one when the kept part is even; a NaN stays a NaN.
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U quiet = (bits >> 16) | 0x40u;
    const U kept = (U)(x == x);
    const H out = __builtin_convertvector((rounded & kept) | (quiet & ~kept), H);
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

static inline F largest(F a, F b) { return a > b ? a : b; }

static inline float sum(F x) {
    double total = 0;
    for (int i = 0; i < kLanes; ++i) total += x[i];
    return (float)total;
}

// exp(x) for x <= 88 to about 1 ulp: 2^n · p(r) with |r| <= ln2/2; exactly 0 below the smallest normal number.
static inline F exp_(F x) {
    const F magic = splat(12582912.0f);  // 1.5 · 2^23: adding it leaves the rounded integer in the low mantissa bits
    const F safe = x > splat(-87.3f) ? x : splat(-87.3f);
    const F n = (safe * 1.44269504f + magic) - magic;
    F r = safe - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    F p = splat(1.98412698e-4f);
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const I scale = (__builtin_convertvector(n, I) + 127) << 23;
    const F out = p * (F)scale;
    const F kept = x >= splat(-87.3f) ? out : splat(0.0f);
    return x == x ? kept : x;
}

// tanh(x) through exp(-2|x|), which never overflows.
static inline F tanh_(F x) {
    const F a = x < splat(0.0f) ? -x : x;
    const F e = exp_(a * -2.0f);
    const F t = (1.0f - e) / (1.0f + e);
    return x < splat(0.0f) ? -t : t;
}

static inline F transform(F z, float inv_temperature, float softcap) {
    if (softcap > 0.0f) z = tanh_(z * (1.0f / softcap)) * softcap;
    return z * inv_temperature;
}

// Blocks of a tile: short enough for the first-level cache and for float sums, long enough to hide the merge.
constexpr int kTile = 32;

template <class T>
static void stats_of_row(const Rows& job, int64_t row) {
    const T* logits = (const T*)job.logits + row * job.stride;
    const float inf = __builtin_inff();
    double best = -inf, mass = 0, heat = 0;  // m, Σ exp(x−m), Σ exp(x−m)(x−m) so far
    F tile[kTile];
    for (int64_t start = 0; start < job.vocab; start += kTile * kLanes) {
        const int64_t left = job.vocab - start;
        const int blocks = left >= kTile * kLanes ? kTile : (int)((left + kLanes - 1) / kLanes);
        F peak = splat(-inf), total = splat(0.0f), weighted = splat(0.0f);
        for (int k = 0; k < blocks; ++k) {
            const int n = (int)(left - k * kLanes < kLanes ? left - k * kLanes : kLanes);
            F x = transform(load_some(logits + start + k * kLanes, n, -inf), job.inv_temperature, job.softcap);
            for (int i = n; i < kLanes; ++i) x[i] = -inf;  // softcap would make missing lanes finite
            tile[k] = x;
            peak = largest(x, peak);
        }
        float top = -inf;
        for (int i = 0; i < kLanes; ++i) top = peak[i] > top ? peak[i] : top;
        const float base = top == -inf ? 0.0f : top;
        for (int k = 0; k < blocks; ++k) {
            const F shifted = tile[k] - base, e = exp_(shifted);
            total = total + e;
            weighted = weighted + (e > splat(0.0f) ? e * shifted : splat(0.0f));  // not 0 · −inf
        }
        const double s = sum(total), w = sum(weighted);
        // Moving the base from m to m' = m + d turns (mass, heat) into e^−d · (mass, heat − d·mass).
        if (top > best) {
            const double d = top - best, fall = __builtin_exp(-d);
            heat = mass > 0 ? fall * (heat - d * mass) : 0.0;
            mass *= fall;
            best = top;
            mass += s;
            heat += w;
        } else {
            const double d = top == -inf ? 0.0 : best - top, fall = __builtin_exp(-d);
            mass += fall * s;
            heat += fall * (w - d * s);
        }
    }
    const double log_mass = __builtin_log(mass);
    const F label = transform(splat(widen(logits[job.labels[row]])), job.inv_temperature, job.softcap);
    job.logps[row] = (float)(((double)label[0] - best) - log_mass);
    job.entropy[row] = (float)(log_mass - heat / mass);
    job.lse[row] = (float)(best + log_mass);
}

template <class T, class G>
static void grads_of_row(const Rows& job, int64_t row) {
    const T* logits = (const T*)job.logits + row * job.stride;
    G* grads = (G*)job.grads + row * job.grad_stride;  // may be the memory of the logits
    const float a = job.d_logps ? job.d_logps[row] : 0.0f;
    const float b = job.d_entropy ? job.d_entropy[row] : 0.0f;
    const float c = job.d_lse ? job.d_lse[row] : 0.0f;
    const float lse = job.lse[row], entropy = job.entropy[row];
    const int64_t label = job.labels[row];
    for (int64_t j = 0; j < job.vocab; j += kLanes) {
        const int n = (int)(job.vocab - j < kLanes ? job.vocab - j : kLanes);
        F z = load_some(logits + j, n, 0.0f);
        F slope = splat(job.inv_temperature);
        if (job.softcap > 0.0f) {
            const F t = tanh_(z * (1.0f / job.softcap));
            slope = slope * (1.0f - t * t);
            z = t * job.softcap;
        }
        const F logp = z * job.inv_temperature - lse;
        const F p = exp_(logp);
        F g = p * (c - a);
        if (b != 0.0f) g = g - (p > splat(0.0f) ? p * (logp + entropy) * b : splat(0.0f));
        if (label >= j && label < j + n) g[label - j] += a;
        store_some(grads + j, g * slope, n);
    }
}

static void row_stats(const Rows& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
        job.dtype == kFloat32 ? stats_of_row<float>(job, row) : stats_of_row<uint16_t>(job, row);
}

static void row_grads(const Rows& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        if (job.dtype == kBFloat16)
            grads_of_row<uint16_t, uint16_t>(job, row);
        else if (job.grad_dtype == kFloat32)
            grads_of_row<float, float>(job, row);
        else
            grads_of_row<float, uint16_t>(job, row);
    }
}

template <class P, class Q>
static void ema_of(const EmaTensor& job, int64_t begin, int64_t end, float step) {
    float* shadow = job.shadow;
    const P* param = (const P*)job.param;
    Q* publish = (Q*)job.publish;
    for (int64_t j = begin; j < end; j += kLanes) {
        const int n = (int)(end - j < kLanes ? end - j : kLanes);
        F s = load_some(shadow + j, n, 0.0f);
        s = s + (load_some(param + j, n, 0.0f) - s) * step;
        store_some(shadow + j, s, n);
        if (publish) store_some(publish + j, s, n);
    }
}

static void ema(const EmaTensor& job, int64_t begin, int64_t end, float step) {
    const bool narrow_in = job.param_dtype == kBFloat16, narrow_out = job.publish_dtype == kBFloat16;
    if (narrow_in)
        narrow_out ? ema_of<uint16_t, uint16_t>(job, begin, end, step) : ema_of<uint16_t, float>(job, begin, end, step);
    else
        narrow_out ? ema_of<float, uint16_t>(job, begin, end, step) : ema_of<float, float>(job, begin, end, step);
}
