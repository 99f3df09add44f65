// Dropout on the CPU: the interface of `cpu.cpp` to the code that is compiled once for each instruction set.
#pragma once

#include <stdint.h>

#include "common/levels.h"
#include "common/stored.h"

namespace conddetr::dropout {

// Elements that are handled together; tasks begin at multiples of it.
constexpr int64_t kChunk = 1024;

// One call; all tensors are contiguous, of `count` elements of the type `stored`.
struct Problem {
  const void* x;
  const void* residual;  // added after dropout, or null
  void* out;
  int64_t count;
  uint64_t seed;
  double p;
  bool relu;  // before dropout
  Stored stored;
};

// Elements from `begin`, a multiple of kChunk, to `end`.
#define CONDDETR_DECLARE(level)                           \
  namespace level {                                       \
  void apply(const Problem&, int64_t begin, int64_t end); \
  }
CONDDETR_FOR_EACH_LEVEL(CONDDETR_DECLARE)
#undef CONDDETR_DECLARE

}  // namespace conddetr::dropout
