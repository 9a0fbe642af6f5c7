// The passes over rows of logits, written once and compiled for each instruction set by isa.cpp.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
//
// Included inside a namespace. Formulas: advgame_kernels/passes_torch.py.

#include "lanes.inl"

typedef double D __attribute__((vector_size(64)));

static inline F largest(F a, F b) { return a > b ? a : b; }

// Neighbours added up in float64.
static inline D wide_sums(F x) {
    typedef float Half __attribute__((vector_size(32)));
    Half halves[2];
    __builtin_memcpy(halves, &x, sizeof x);
    return __builtin_convertvector(halves[0], D) + __builtin_convertvector(halves[1], D);
}

static inline double sum(D x) {
    double total = 0;
    for (int i = 0; i < 8; ++i) total += x[i];
    return total;
}

static inline float peak_of(F x) {
    float top = x[0];
    for (int i = 1; i < kLanes; ++i) top = x[i] > top ? x[i] : top;
    return top;
}

// 2^(x·s) for x·s in [−126, 127], relative error 1.5e-7, exactly 1 at 0. Adding 1.5 · 2^23 leaves the rounded integer in the low
// bits of the mantissa; a smaller constant leaves as many binary places as the table has.
#ifdef ADVGAME_AVX512
// x·s = n + k/32 + r with |r| <= 1/64: 2^(k/32) from a table in two registers, looked up by the low five bits on a port that has
// nothing else to do; 2^r − 1 from a quadratic. Entry k lacks the k/32 that adding 32n + k to its exponent and mantissa brings.
static const uint32_t kPowers[2 * kLanes] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
};

static inline F exp2_(F x, F s) {
    U low, high;
    __builtin_memcpy(&low, kPowers, sizeof low);
    __builtin_memcpy(&high, kPowers + kLanes, sizeof high);
    const F magic = splat(12582912.0f / 32);
    const F shifted = x * s + magic;
    const F r = x * s - (shifted - magic);
    const F rest = (splat(2.402265e-1f) * r + 6.9315733e-1f) * r;
    const F power = (F)(__builtin_shuffle(low, high, (U)shifted) + ((U)shifted << 18));
    return power * rest + power;
}
#else
// x·s = n + r with |r| <= 1/2: 2^r from a polynomial, n added to the exponent.
static inline F exp2_(F x, F s) {
    const F magic = splat(12582912.0f);
    const F shifted = x * s + magic;
    const F r = x * s - (shifted - magic);
    F p = splat(1.32695155e-3f);
    p = p * r + 9.67129041e-3f;
    p = p * r + 5.55071086e-2f;
    p = p * r + 2.40222469e-1f;
    p = p * r + 6.93147004e-1f;
    p = p * r + 1.0f;
    return (F)((U)p + ((U)shifted << 23));
}
#endif

constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;
// Exponents end at −100: what is smaller counts as 2^−100 in sums, where nothing of it is left beside a mass of 1, and as 0 in
// gradients. That is far enough above the smallest float for no product to become subnormal, which costs a hundred cycles.
constexpr float kLowest = -100.0f;

// tanh(x) through exp(-2|x|), which never overflows; near 0, where 1 − e would lose digits, its series.
static inline F tanh_(F x) {
    const F a = x < splat(0.0f) ? -x : x;
    const F e = exp2_(largest(splat(kLowest), a * (float)(-2.0 * kLog2E)), splat(1.0f));
    const F s = a * a;
    const F series = a + a * s * (-0.33333333f + s * (0.13333333f + s * (-0.053968254f + s * 0.021869488f)));
    const F t = a < splat(0.25f) ? series : (1.0f - e) / (1.0f + e);
    return x < splat(0.0f) ? -t : t;
}

template <bool capped>
static inline F cap(F z, float softcap) {
    return capped ? tanh_(z * (1.0f / softcap)) * softcap : z;
}

// The sums go two blocks at a time; a pair of bfloat16 blocks comes as even and odd elements, at one instruction a block.
constexpr int kStep = 2 * kLanes;

static inline void load_pair(const float* p, F& a, F& b) {
    a = load(p);
    b = load(p + kLanes);
}

static inline void load_pair(const uint16_t* p, F& a, F& b) {
    U both;
    __builtin_memcpy(&both, p, sizeof both);
    a = (F)(both << 16);
    b = (F)(both & 0xffff0000u);
}

// Σ e and Σ e·d, lane by lane, with d = x − base and e = exp(d / temperature).
struct Sums {
    F mass = splat(0.0f), heat = splat(0.0f);

    void add(F x, F base, F scale, F lowest) {
        const F d = largest(lowest, x - base);
        const F e = exp2_(d, scale);
        mass = mass + e;
        heat = heat + e * d;
    }
};

// A row is read in two places at once, from its beginning and from its middle: waiting for the translation of one page (4 KiB
// as a rule) then does not hold up the other, and a core reads half as fast again.
template <class T>
struct Tile {
    const T *x, *y;
    int64_t n;  // elements of each
};

// As much of a row as is short enough for float sums, and for the first-level cache in case it is read again.
constexpr int64_t kTile = 128 * kStep;
constexpr int kAhead = 2048;  // bytes of prefetch: the hardware's own stops at every page

template <class T>
static inline void prefetch_step(const T* p) {
    __builtin_prefetch((const char*)p + kAhead);
    if (sizeof(T) == 4) __builtin_prefetch((const char*)p + kAhead + 64);
}

template <class T, bool capped>
static inline Sums sums_of_tile(const Tile<T>& tile, float base, const Rows& job) {
    const float scale = (float)(kLog2E * job.inv_temperature);
    const F m = splat(base), s = splat(scale), lowest = splat(kLowest / scale);
    Sums one, two;
    for (int64_t j = 0; j < tile.n; j += kStep) {
        prefetch_step(tile.x + j);
        prefetch_step(tile.y + j);
        F a, b, c, d;
        load_pair(tile.x + j, a, b);
        load_pair(tile.y + j, c, d);
        one.add(cap<capped>(a, job.softcap), m, s, lowest);
        two.add(cap<capped>(b, job.softcap), m, s, lowest);
        one.add(cap<capped>(c, job.softcap), m, s, lowest);
        two.add(cap<capped>(d, job.softcap), m, s, lowest);
    }
    one.mass = one.mass + two.mass;
    one.heat = one.heat + two.heat;
    return one;
}

template <class T, bool capped>
static float peak_of_tile(const Tile<T>& tile, const Rows& job) {
    F peak = splat(-__builtin_inff());
    for (const T* from : {tile.x, tile.y})
        for (int64_t j = 0; j < tile.n; j += kLanes) peak = largest(cap<capped>(load(from + j), job.softcap), peak);
    return peak_of(peak);
}

// A lane's sum over a tile that only values well above the base reach.
constexpr float kHigh = 1024.0f;

// A row so far, relative to `best`: a value that the row holds, though not always its largest. Float sums have room above, so a
// tile is looked through for a larger one only when its sums run high, and most rows are read once.
struct RowSums {
    float best = -__builtin_inff();
    D mass{}, heat{};
    double inv_temperature;

    // From base m to base m + d: (mass, heat) becomes e^(−d/T) · (mass, heat − d·mass).
    void raise(float top) {
        if (best > -__builtin_inff()) {
            const double d = (double)top - best, fall = __builtin_exp(-d * inv_temperature);
            heat = (heat - mass * d) * fall;
            mass = mass * fall;
        }
        best = top;
    }

    template <class T, bool capped>
    void add(const Tile<T>& tile, const Rows& job) {
        const bool first = best == -__builtin_inff();
        Sums part;
        if (!first) part = sums_of_tile<T, capped>(tile, best, job);
        if (first || peak_of(part.mass) > kHigh) {
            const float top = peak_of_tile<T, capped>(tile, job);
            if (top > best) raise(top);
            part = sums_of_tile<T, capped>(tile, best == -__builtin_inff() ? 0.0f : best, job);
            if (best == -__builtin_inff()) part.mass = part.heat * 0.0f;  // nothing but −inf: no mass, unless there is a NaN
        }
        mass = mass + wide_sums(part.mass);
        heat = heat + wide_sums(part.heat);
    }
};

template <class T, bool capped>
static void stats_of_row(const Rows& job, int64_t row) {
    const T* logits = (const T*)job.logits + row * job.stride;
    RowSums all;
    all.inv_temperature = job.inv_temperature;
    const int64_t half = job.vocab / (2 * kStep) * kStep, whole = 2 * half;
    for (int64_t start = 0; start < half; start += kTile)
        all.add<T, capped>({logits + start, logits + half + start, half - start < kTile ? half - start : kTile}, job);
    if (whole < job.vocab) {
        float tail[2 * kStep];
        for (int i = 0; i < 2 * kStep; ++i)
            tail[i] = whole + i < job.vocab ? cap<capped>(splat(widen(logits[whole + i])), job.softcap)[0] : -__builtin_inff();
        all.add<float, false>({tail, tail + kStep, kStep}, job);
    }
    double mass = sum(all.mass);
    double heat = sum(all.heat) * job.inv_temperature;
    if (__builtin_fabs(heat) < 1e-20) heat = 0;  // what the terms that count as 2^−100 have left
    if (heat != heat) mass = heat;  // a NaN whose exponent bits the addition in exp2_ has changed
    const double log_mass = __builtin_log(mass), best = all.best;
    const double label = cap<capped>(splat(widen(logits[job.labels[row]])), job.softcap)[0];
    job.logps[row] = (float)((label - best) * job.inv_temperature - log_mass);
    job.entropy[row] = (float)(log_mass - heat / mass);
    job.lse[row] = best * job.inv_temperature + log_mass;
}

// What a row's gradient is made of: g = 2^e · (lift − pull · (e·ln 2 + shift)) · slope with e = z·scale − base, see passes_torch.row_grads_.
struct RowFactors {
    F scale, base, lift, pull, shift, inv_temperature;
    float softcap;
};

template <bool capped>
static inline F slope_of(F z, const RowFactors& f) {
    if (!capped) return f.inv_temperature;
    const F t = tanh_(z * (1.0f / f.softcap));
    return f.inv_temperature * (1.0f - t * t);
}

template <bool capped, bool with_entropy>
static inline F grads_of_block(F z, const RowFactors& f) {
    const F x = cap<capped>(z, f.softcap);
    const F raw = x * f.scale - f.base;
    F factor = f.lift;
    if (with_entropy) factor = factor - f.pull * (raw * kLn2 + f.shift);
    if (capped) factor = factor * slope_of<capped>(z, f);
    const F g = exp2_(largest(splat(kLowest), raw), splat(1.0f)) * factor;
    return raw < splat(kLowest) ? splat(0.0f) : g;
}

template <class T, class G, bool capped, bool with_entropy>
static void grads_of_row(const Rows& job, int64_t row) {
    const T* logits = (const T*)job.logits + row * job.stride;
    G* grads = (G*)job.grads + row * job.grad_stride;  // may be the memory of the logits
    const float a = job.d_logps ? job.d_logps[row] : 0.0f;
    const float b = job.d_entropy ? job.d_entropy[row] : 0.0f;
    const float c = job.d_lse ? job.d_lse[row] : 0.0f;
    const double lse = job.lse[row];
    const float scale = (float)(kLog2E * job.inv_temperature);
    // The exponent is 0 where z/T = lse, whatever the rounding of `scale`; that of `base` is made up for by the factors.
    const double exact = lse / job.inv_temperature * scale;
    const float base = (float)exact;
    const float left = (float)__builtin_exp2(base - exact) * (capped ? 1.0f : (float)job.inv_temperature);
    const RowFactors f{splat(scale), splat(base), splat((c - a) * left), splat(b * left),
                       splat((float)(job.entropy[row] + (base - exact) / kLog2E)), splat((float)job.inv_temperature), job.softcap};
    const int64_t label = job.labels[row];
    const F own = splat(label >= 0 ? widen(logits[label]) : 0.0f);
    int64_t j = 0;
    for (; j + kLanes <= job.vocab; j += kLanes) {
        __builtin_prefetch((const char*)(logits + j) + kAhead);
        store(grads + j, grads_of_block<capped, with_entropy>(load(logits + j), f));
    }
    if (j < job.vocab) {
        const int n = (int)(job.vocab - j);
        store_some(grads + j, grads_of_block<capped, with_entropy>(load_some(logits + j, n, 0.0f), f), n);
    }
    if (label >= 0) store_some(grads + label, grads_of_block<capped, with_entropy>(own, f) + a * slope_of<capped>(own, f), 1);
}

template <class T>
static void stats_of_rows(const Rows& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
        job.softcap > 0.0f ? stats_of_row<T, true>(job, row) : stats_of_row<T, false>(job, row);
}

template <class T, class G>
static void grads_of_rows(const Rows& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const bool with_entropy = job.d_entropy && job.d_entropy[row] != 0.0f;
        if (job.softcap > 0.0f)
            with_entropy ? grads_of_row<T, G, true, true>(job, row) : grads_of_row<T, G, true, false>(job, row);
        else
            with_entropy ? grads_of_row<T, G, false, true>(job, row) : grads_of_row<T, G, false, false>(job, row);
    }
}

static void row_stats(const Rows& job, int64_t begin, int64_t end) {
    job.dtype == kFloat32 ? stats_of_rows<float>(job, begin, end) : stats_of_rows<uint16_t>(job, begin, end);
}

static void row_grads(const Rows& job, int64_t begin, int64_t end) {
    if (job.dtype == kBFloat16)
        grads_of_rows<uint16_t, uint16_t>(job, begin, end);
    else
        job.grad_dtype == kFloat32 ? grads_of_rows<float, float>(job, begin, end) : grads_of_rows<float, uint16_t>(job, begin, end);
}
