// The fastest that this processor multiplies and adds float32 in registers: what benchmarks compare kernels with.
#pragma once

#include <stdint.h>

#include "common/levels.h"

namespace conddetr::peak {

// Floating-point operations per second of all of torch's threads together: the best of some milliseconds.
double multiply_adds_per_second();

// Each level: `rounds` times some multiply-adds, in this thread. `operations` is how many that were; `sink` gets a
// number that depends on them, so that none can be left out.
#define CONDDETR_DECLARE(level)                                        \
  namespace level {                                                    \
  void multiply_add(int64_t rounds, int64_t& operations, float& sink); \
  }
CONDDETR_FOR_EACH_LEVEL(CONDDETR_DECLARE)
#undef CONDDETR_DECLARE

}  // namespace conddetr::peak
