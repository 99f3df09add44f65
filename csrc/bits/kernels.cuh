// Random bits on a GPU. A thread makes one word of 32 decisions; kernels/bits/reference.py says how.
#pragma once

#include "common/philox.h"
#include "common/warp.cuh"

namespace conddetr::bits {

constexpr int kThreads = 256;

// One more bit of 32 comparisons: where it differs from the threshold's, it decides anew.
CONDDETR_BOTH uint32_t compare(uint32_t below, uint32_t word, uint32_t threshold, int bit) {
  const uint32_t of_threshold = 0u - (threshold >> bit & 1u);
  return (~word & (of_threshold | below)) | (of_threshold & below);
}

__global__ void __launch_bounds__(kThreads)
    fill_kernel(uint32_t* words, const int64_t* seed, int64_t count, uint32_t threshold) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  uint32_t below = 0;
#pragma unroll
  for (int call = 0; call < 4; ++call) {
    const philox::Four numbers = philox::randint4x(uint64_t(*seed), 4 * uint64_t(index) + uint64_t(call));
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) below = compare(below, numbers.lane[lane], threshold, 4 * call + lane);
  }
  words[index] = ~below;
}

}  // namespace conddetr::bits
