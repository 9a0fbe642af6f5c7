// Which compiled form of the inner loops to run.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dtypes.h"

const Kernels* best_kernels();
const Kernels* find_kernels(const char* name);  // null when this processor cannot run it
