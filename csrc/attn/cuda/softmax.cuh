// The online softmax of a warp's rows, over tiles of 64 keys.
#pragma once

#include "attn/cuda/problem.cuh"
#include "common/softmax.h"

namespace conddetr::attn {

// `update` turns scores before the scale into weights. If the scale is known to be positive, the maximum is taken
// before scaling.
template <bool kIsPositive = false>
struct Softmax {
  float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // of rows g and g + 8; totals of this lane's columns
  float shrink[2];                                               // factors for the sums so far

  __device__ void update(float (&scores)[8][4], float log2_scale) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float higher = kIsPositive ? scores[0][2 * row] : highest[row];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float score = scores[i / 2][2 * row + i % 2];
        higher = fmaxf(higher, kIsPositive ? score : score * log2_scale);
      }
      if constexpr (kIsPositive) higher = fmaxf(highest[row], higher * log2_scale);
      higher = fmaxf(higher, from_lane_xor(higher, 1));
      higher = fmaxf(higher, from_lane_xor(higher, 2));
      const float reference = softmax_reference(higher);
      shrink[row] = exp2_fast(highest[row] - reference);
      highest[row] = higher;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& score = scores[i / 2][2 * row + i % 2];
        const float power = score * log2_scale - reference;  // fused: rounded once
        score = exp2_fast(power);
        sum += score;
      }
      total[row] = total[row] * shrink[row] + sum;
    }
  }

  // Shrinks the sums so far, of rows g and g + 8. Maxima seldom change after the first tiles.
  __device__ __forceinline__ void shrink_sums(float (&sums)[4][4]) const {
    if (ballot(shrink[0] != 1 || shrink[1] != 1) == 0) return;
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] *= shrink[i / 2 % 2];
  }

  __device__ float sum(int row) const {
    const float pair = total[row] + from_lane_xor(total[row], 1);
    return pair + from_lane_xor(pair, 2);
  }
};

}  // namespace conddetr::attn
