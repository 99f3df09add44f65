// Arguments of the attention kernels, and their division of threads and shared memory.
#pragma once

#include "attn/cuda/keys.h"
#include "attn/cuda/tile.cuh"

namespace conddetr::attn {

// [batch, items, heads, 32]; strides in numbers, of multiples of 16 bytes.
template <typename T>
struct Rows {
  const T* data;
  int64_t image, item, head;

  __device__ const T* of(int in_image, int in_head) const { return data + in_image * image + in_head * head; }
};

// The inputs. With separable keys `spatial` has the grid's rows, `columns` its columns; else `columns` has no data, and
// the grid has one row.
template <typename T>
struct Problem {
  Rows<T> q_content, q_spatial, k_content, spatial, columns, v;
  int queries, keys, heads, height, width;
  const int32_t* valid_cells;  // or null
  const bool* padding;         // [batch, keys], or null
  const uint32_t* keep;        // [batch, heads, keep_words, queries]: bit j of word w is for ordinal 32 w + j; or null
  int keep_words;              // two for each tile of the grid
  float scale, log2_scale;     // the latter times log2(e), and never 0: infinite hidden scores stay infinite
  float hidden;                // -inf times the sign of the scale
  float drop_factor;           // 1 - p

  __device__ Keys keys_of(int image) const { return {valid_rectangle(valid_cells, image, height, width), width}; }
  __device__ int64_t query_index(int image, int head, int query) const {
    return (int64_t(image) * heads + head) * queries + query;
  }
  // The first of two rows of words, one after the other in memory, for a tile of keys.
  __device__ const uint32_t* keep_of(int image, int head, int tile) const {
    return keep + ((int64_t(image) * heads + head) * keep_words + 2 * tile) * queries;
  }
};

// grad and out, contiguous [batch, queries, heads, 32]; lse and delta [batch, heads, queries]. delta = grad · out,
// without dropout's 1 / (1 - p).
template <typename T>
struct Upstream {
  const T* grad;
  const T* out;
  const float* lse;
  float* delta;
};

struct Lane {
  int warp, g, t;
  __device__ Lane() : warp(threadIdx.x / kLanes), g(threadIdx.x % kLanes / 4), t(threadIdx.x % 4) {}
  __device__ int first_row() const { return warp * kWarpRows; }
};

// Least number of blocks on a multiprocessor, as far as registers allow: 168 for each thread, or all 255.
template <typename T>
constexpr int kBlocks = sizeof(T) == 2 ? 3 : 2;

// Unrolled groups in backward, of the four groups of 16 columns of a tile; with more, registers spill.
template <typename T>
constexpr int kUnrolledGroups = sizeof(T) == 2 ? 2 : 1;

// Allocates a block's shared memory.
struct Shared {
  char* next = shared_memory();

  template <typename V>
  __device__ V* take(int count) {
    V* start = reinterpret_cast<V*>(next);
    next += count * int(sizeof(V));
    return start;
  }
  template <typename T>
  __device__ Tile<T> tile(int count = 1) {
    return {take<T>(count * kTile * kWidth)};
  }
};

template <int N>
__device__ __forceinline__ void clear(float (&values)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i][0] = values[i][1] = values[i][2] = values[i][3] = 0.0f;
}

template <int N>
__device__ __forceinline__ void scale_by(float (&values)[N][4], float factor) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) values[i / 4][i % 4] *= factor;
}

}  // namespace conddetr::attn
