// The peak rate of float32 multiply-adds in registers on this processor, which benchmarks compare kernels with.
#pragma once

#include <stdint.h>

#include "common/levels.h"

namespace conddetr::peak {

// Floating-point operations per second of all of torch's threads together: the best of several short runs.
double multiply_adds_per_second();

// Each level: `rounds` rounds of multiply-adds, in this thread. `operations` is set to the number of operations, `sink`
// to a number that depends on them, so that the compiler cannot remove any.
#define CONDDETR_DECLARE(level)                                        \
  namespace level {                                                    \
  void multiply_add(int64_t rounds, int64_t& operations, float& sink); \
  }
CONDDETR_FOR_EACH_LEVEL(CONDDETR_DECLARE)
#undef CONDDETR_DECLARE

}  // namespace conddetr::peak
