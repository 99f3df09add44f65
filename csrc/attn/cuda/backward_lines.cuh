// Gradients of separable keys from those of the corresponding dense keys.
#pragma once

#include "attn/cuda/problem.cuh"

namespace conddetr::attn {

template <typename T>
struct alignas(16) Chunk {
  T numbers[Tile<T>::kPerChunk];
};

// Contiguous [batch, height or width, heads, 32], from [batch, keys, heads, 32]: sums over the columns of the valid
// rectangle for each row, over its rows for each column; zeros outside. A warp sums one row or column of one head.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_lines_kernel(Problem<T> p, const T* grad, T* grad_rows, T* grad_columns) {
  constexpr int kChunks = Tile<T>::kChunks, kPerChunk = Tile<T>::kPerChunk, kAtOnce = kLanes / kChunks;
  const int line = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes, head = blockIdx.y, image = blockIdx.z;
  if (line >= p.height + p.width) return;
  const Rectangle valid = p.keys_of(image).valid;
  const bool is_row = line < p.height;
  const int index = is_row ? line : line - p.height;
  const int items = index < (is_row ? valid.height : valid.width) ? (is_row ? valid.width : valid.height) : 0;
  const int lane = threadIdx.x % kLanes, chunk = lane % kChunks;
  const int64_t stride = int64_t(p.heads) * kWidth, channel = head * kWidth + chunk * kPerChunk;
  const int64_t first = (int64_t(image) * p.keys + index * (is_row ? p.width : 1)) * stride + channel;
  const int64_t step = stride * (is_row ? 1 : p.width);

  float sums[kPerChunk] = {};
#pragma unroll 4
  for (int i = lane / kChunks; i < items; i += kAtOnce) {
    const Chunk<T> loaded = *reinterpret_cast<const Chunk<T>*>(grad + first + i * step);
#pragma unroll
    for (int j = 0; j < kPerChunk; ++j) sums[j] += to_float(loaded.numbers[j]);
  }
#pragma unroll
  for (int mask = kChunks; mask < kLanes; mask *= 2) {
#pragma unroll
    for (int j = 0; j < kPerChunk; ++j) sums[j] += from_lane_xor(sums[j], mask);
  }
  if (lane >= kChunks) return;
  Chunk<T> result;
#pragma unroll
  for (int j = 0; j < kPerChunk; ++j) result.numbers[j] = from_float<T>(sums[j]);
  T* target = is_row ? grad_rows : grad_columns;
  const int64_t target_item = int64_t(image) * (is_row ? p.height : p.width) + index;
  *reinterpret_cast<Chunk<T>*>(target + target_item * stride + channel) = result;
}

}  // namespace conddetr::attn
