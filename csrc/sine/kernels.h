// Sine embedding on the CPU: the interface of `cpu.cpp` to the code that is compiled once for each instruction set.
#pragma once

#include <stdint.h>

#include "common/levels.h"
#include "common/stored.h"

namespace conddetr::sine {

// One call; all tensors are contiguous, [count, 2] points and [count, dim] channels, of the type `stored`.
struct Problem {
  const void* points;
  const void* transform;  // λ, or null
  int64_t dim;
  const double* rates;  // [dim / 2] turns per unit of the coordinate
  Stored stored;
};

struct Gradients {
  const void* upstream;
  void* points;
  void* transform;  // null without λ
};

// Rows `begin` to `end`.
#define CONDDETR_DECLARE(level)                                                \
  namespace level {                                                            \
  void forward(const Problem&, void* out, int64_t begin, int64_t end);         \
  void backward(const Problem&, const Gradients&, int64_t begin, int64_t end); \
  }
CONDDETR_FOR_EACH_LEVEL(CONDDETR_DECLARE)
#undef CONDDETR_DECLARE

}  // namespace conddetr::sine
