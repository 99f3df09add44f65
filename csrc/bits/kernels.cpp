// Random bits on the CPU, compiled once for each instruction set. A lane computes one word of 32 decisions;
// kernels/bits/reference.py explains how.

#include "bits/kernels.h"

#include "common/philox_simd.h"

namespace conddetr::bits::CONDDETR_LEVEL {
namespace {

// Bits set where the numbers of words `first`, `first` + 1, … are below the threshold; the upper halves of lanes have
// no meaning.
CONDDETR_INLINE Wide below(uint64_t seed, uint32_t threshold, uint64_t first) {
  Wide result = {};
  for (int call = 0; call < 4; ++call) {
    Wide counter;
    for (int i = 0; i < kCounters; ++i) counter[i] = 4 * (first + uint64_t(i)) + uint64_t(call);
    const WideFour numbers = random_lanes(seed, counter);
    for (int lane = 0; lane < 4; ++lane) {
      const Wide word = numbers.lane[lane];
      result = threshold >> (4 * call + lane) & 1 ? ~word | result : ~word & result;
    }
  }
  return result;
}

}  // namespace

void fill(uint32_t* words, uint64_t seed, uint32_t threshold, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kCounters) {
    const Wide kept = ~below(seed, threshold, uint64_t(first));
    const int64_t count = end - first < kCounters ? end - first : kCounters;
    for (int64_t i = 0; i < count; ++i) words[first + i] = uint32_t(kept[i]);
  }
}

}  // namespace conddetr::bits::CONDDETR_LEVEL
