// The checksum of bytes, sixty-four at a time, compiled for each instruction set by isa.cpp.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
//
// Included inside a namespace, after lanes.inl. Formula: advgame_kernels/sums.py. Bytes are taken out of words by shifts, as
// sums_triton.py does it: conversions between vectors of different widths are slow where they span registers.

// Over bytes [begin, end) of `data`, modulo 2^64.
uint64_t byte_sum(const uint8_t* data, int64_t begin, int64_t end) {
    constexpr uint32_t factor = 2654435761u;
    constexpr int64_t line = 4 * kLanes, most = 64 * line;  // a lane adds up 256 products of a byte and 16 bits: 32 bits
    uint64_t weighted = 0, plain = 0;
    int64_t i = begin;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    while (i + line <= end) {
        const int64_t stop = i + (end - i > most ? most : (end - i) / line * line);
        U place = (U{0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60} + (uint32_t)i) * factor;
        U products = {}, bytes = {};
        for (; i < stop; i += line) {
            U word;
            __builtin_memcpy(&word, data + i, sizeof word);
            for (uint32_t k = 0; k < 4; ++k) {
                const U byte = (word >> (8 * k)) & 0xffu;
                products += byte * ((place + k * factor) >> 16);
                bytes += byte;
            }
            place += (uint32_t)line * factor;
        }
        for (int lane = 0; lane < kLanes; ++lane) weighted += products[lane], plain += bytes[lane];
    }
#endif
    for (; i < end; ++i) weighted += (uint64_t)data[i] * ((uint32_t)i * factor >> 16), plain += data[i];
    return 2 * weighted + plain;
}
