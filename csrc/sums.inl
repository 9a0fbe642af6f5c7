// The checksum of bytes, sixteen at a time, compiled for each instruction set by isa.cpp.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
//
// Included inside a namespace, after lanes.inl. Formula: advgame_kernels/sums.py.

typedef uint8_t B __attribute__((vector_size(16)));

// Over bytes [begin, end) of `data`, modulo 2^64.
uint64_t byte_sum(const uint8_t* data, int64_t begin, int64_t end) {
    constexpr uint32_t factor = 40503;
    uint64_t weighted = 0, plain = 0;
    int64_t i = begin;
    while (i + kLanes <= end) {
        // a lane adds up 128 products of a byte and 16 bits: 31 bits
        const int64_t stop = end - i > 128 * kLanes ? i + 128 * kLanes : i + (end - i) / kLanes * kLanes;
        U place = (U{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (uint32_t)i) * factor;
        U products = {}, bytes = {};
        for (; i < stop; i += kLanes) {
            B raw;
            __builtin_memcpy(&raw, data + i, sizeof raw);
            const U byte = __builtin_convertvector(__builtin_convertvector(raw, H), U);
            products += byte * (place & 0xffffu);
            bytes += byte;
            place += kLanes * factor;
        }
        for (int lane = 0; lane < kLanes; ++lane) weighted += products[lane], plain += bytes[lane];
    }
    for (; i < end; ++i) weighted += (uint64_t)data[i] * ((uint32_t)i * factor & 0xffffu), plain += data[i];
    return 2 * weighted + plain;
}
