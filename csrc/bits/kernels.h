// Random bits on the CPU: the interface of `cpu.cpp` to the code that is compiled once for each instruction set.
#pragma once

#include <stdint.h>

#include "common/levels.h"

namespace conddetr::bits {

// Words that are computed together, a multiple of the lanes of every instruction set.
constexpr int64_t kChunk = 64;

// Words `begin`, a multiple of kChunk, to `end`; a bit is 1, kept, if its number of 16 bits is not below the threshold.
#define CONDDETR_DECLARE(level)                                                              \
  namespace level {                                                                          \
  void fill(uint32_t* words, uint64_t seed, uint32_t threshold, int64_t begin, int64_t end); \
  }
CONDDETR_FOR_EACH_LEVEL(CONDDETR_DECLARE)
#undef CONDDETR_DECLARE

}  // namespace conddetr::bits
