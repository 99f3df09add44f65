// Random bits on a GPU. A thread computes some words of 32 decisions; kernels/bits/reference.py explains how.
#pragma once

#include "common/philox.h"
#include "common/warp.cuh"

namespace conddetr::bits {

constexpr int kThreads = 256;
constexpr int kWords = 4;  // per thread
constexpr int kBlockWords = kWords * kThreads;

constexpr int kBits = 16;

// All ones or all zeros for each bit, as a word of 32 comparisons needs it.
struct Threshold {
  uint32_t bit[kBits];

  explicit Threshold(uint32_t threshold) {
    for (int i = 0; i < kBits; ++i) bit[i] = 0u - (threshold >> i & 1u);
  }
};

// Adds one bit to 32 comparisons: where it differs from the threshold's bit, it decides.
CONDDETR_BOTH uint32_t compare(uint32_t below, uint32_t word, uint32_t threshold_bit) {
  return (~word & (threshold_bit | below)) | (threshold_bit & below);
}

__global__ void __launch_bounds__(kThreads)
    fill_kernel(uint32_t* words, const int64_t* seed, int64_t count, Threshold threshold) {
  const philox::Keys keys{uint64_t(*seed)};
  const int64_t first = int64_t(blockIdx.x) * kBlockWords + threadIdx.x;
#pragma unroll 1  // the words share the keys
  for (int64_t index = first; index < first + kBlockWords && index < count; index += kThreads) {
    uint32_t below = 0;
#pragma unroll
    for (int call = 0; call < kBits / 4; ++call) {
      const philox::Four numbers = philox::randint4x(keys, 4 * uint64_t(index) + uint64_t(call));
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) below = compare(below, numbers.lane[lane], threshold.bit[4 * call + lane]);
    }
    words[index] = ~below;
  }
}

}  // namespace conddetr::bits
