// Splits a range over threads; small ranges stay on the calling thread.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

// Calls body(begin, end) on consecutive parts of [0, total). `grain` is the least work that pays for a thread's start.
template <class Body>
void parallel_for(int64_t total, int64_t grain, int threads, Body body) {
    const int64_t useful = std::max<int64_t>(1, total / std::max<int64_t>(1, grain));
    const int64_t parts = std::min<int64_t>({useful, std::max(1, threads), std::max<int64_t>(1, total)});
    if (parts == 1) {
        body(int64_t{0}, total);
        return;
    }
    std::vector<std::thread> pool;
    pool.reserve(parts - 1);
    int64_t i = 1;
    try {
        for (; i < parts; ++i) pool.emplace_back([=] { body(total * i / parts, total * (i + 1) / parts); });
    } catch (const std::system_error&) {
        body(total * i / parts, total);  // no thread to be had: the rest is this one's
    }
    body(int64_t{0}, total / parts);
    for (auto& thread : pool) thread.join();
}
