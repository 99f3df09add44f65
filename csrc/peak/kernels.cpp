// Multiply-adds that depend on nothing but registers. Compiled once for each instruction set.

#include "peak/kernels.h"

#include "common/lanes.h"

namespace conddetr::peak::CONDDETR_LEVEL {

void multiply_add(int64_t rounds, int64_t& operations, float& sink) {
  // Enough independent chains to hide the latency of two units of up to six cycles.
  constexpr int kChains = 12;
  Vector<float> sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = broadcast(float(i));
  const Vector<float> factor = broadcast(sink), summand = broadcast(1 - sink);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * factor + summand;
  }
  Vector<float> total = {};
  for (int i = 0; i < kChains; ++i) total += sums[i];
  sink = sum_of<float>(total);
  operations = rounds * kChains * kLanes<float> * 2;
}

}  // namespace conddetr::peak::CONDDETR_LEVEL
