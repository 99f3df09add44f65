// Sine embedding and λ ⊙ p_s on a GPU, forward and backward, in one pass over memory.
#pragma once

#include "common/sincos.h"
#include "common/warp.cuh"

namespace conddetr::sine {

constexpr int kThreads = 256;
// Channels that a thread handles at a time: two pairs of sine and cosine, 16 bytes of float32.
constexpr int kVector = 4;

template <typename T>
struct alignas(kVector * sizeof(T)) Vector {
  T value[kVector];
};

// Turns per unit of the coordinate. Channels come in pairs of sine and cosine; `half` is dim / 2.
CONDDETR_BOTH float rate(int channel, int half, float log2_temperature) {
  const int within = channel < half ? channel : channel - half;
  return exp2f(-log2_temperature * float(within & ~1) / float(half));
}

// The embedding of one channel, and its derivative by the coordinate. y's half of the channels comes first; the
// cosine of the odd channels is a sine a quarter turn ahead.
CONDDETR_BOTH float embed(float x, float y, int channel, int half, float log2_temperature) {
  const float turns = (channel < half ? y : x) * rate(channel, half, log2_temperature);
  return sin_turns(turns + (channel & 1 ? 0.25f : 0.0f));
}
CONDDETR_BOTH float embed_slope(float x, float y, int channel, int half, float log2_temperature) {
  const float turns_per_unit = rate(channel, half, log2_temperature);
  const float turns = (channel < half ? y : x) * turns_per_unit;
  return sin_turns(turns + (channel & 1 ? 0.5f : 0.25f)) * (turns_per_unit * 6.283185307179586f);
}

// out[n] = embedding of points[n], times transform[n] if there is one; a thread computes one vector of channels.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* points, const T* transform, T* out, int64_t count, int dim, float log2_temperature) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int per_row = dim / kVector;
  const int64_t row = index / per_row;
  if (row >= count) return;
  const int first = int(index - row * per_row) * kVector;
  const float x = to_float(points[2 * row]), y = to_float(points[2 * row + 1]);
  Vector<T> scale, result;
  if (transform) scale = reinterpret_cast<const Vector<T>*>(transform)[index];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float value = embed(x, y, first + i, dim / 2, log2_temperature);
    result.value[i] = from_float<T>(transform ? value * to_float(scale.value[i]) : value);
  }
  reinterpret_cast<Vector<T>*>(out)[index] = result;
}

// A warp handles one row, so the sum over its channels stays in registers, in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* grad, const T* points, const T* transform, T* grad_points, T* grad_transform,
                    int64_t count, int dim, float log2_temperature) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= count) return;
  const int lane = threadIdx.x % kLanes, per_row = dim / kVector;
  const float x = to_float(points[2 * row]), y = to_float(points[2 * row + 1]);
  float sum_x = 0, sum_y = 0;
  for (int vector = lane; vector < per_row; vector += kLanes) {
    const int64_t index = row * per_row + vector;
    const Vector<T> upstream = reinterpret_cast<const Vector<T>*>(grad)[index];
    Vector<T> scale, result;
    if (transform) scale = reinterpret_cast<const Vector<T>*>(transform)[index];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int channel = vector * kVector + i;
      float slope = to_float(upstream.value[i]) * embed_slope(x, y, channel, dim / 2, log2_temperature);
      if (transform) {
        slope *= to_float(scale.value[i]);
        result.value[i] = from_float<T>(to_float(upstream.value[i]) * embed(x, y, channel, dim / 2, log2_temperature));
      }
      (channel < dim / 2 ? sum_y : sum_x) += slope;
    }
    if (transform) reinterpret_cast<Vector<T>*>(grad_transform)[index] = result;
  }
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    sum_x += from_lane_xor(sum_x, mask);
    sum_y += from_lane_xor(sum_y, mask);
  }
  if (lane == 0) {
    grad_points[2 * row] = from_float<T>(sum_x);
    grad_points[2 * row + 1] = from_float<T>(sum_y);
  }
}

}  // namespace conddetr::sine
