// Which compiled form of the inner loops to run.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dtypes.h"

const Kernels* best_kernels();
const Kernels* find_kernels(const char* name);  // null when this processor cannot run it

// The weight average has a file of its own, ema.cpp, since it is compiled by other rules of arithmetic.
namespace generic { void ema(const EmaTensor&, int64_t begin, int64_t end, const EmaCall&); }
namespace avx2 { void ema(const EmaTensor&, int64_t begin, int64_t end, const EmaCall&); }
namespace avx512 { void ema(const EmaTensor&, int64_t begin, int64_t end, const EmaCall&); }
