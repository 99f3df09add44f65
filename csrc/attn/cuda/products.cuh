// The two matrix products of attention, by one warp, of tiles in shared memory.
//
// A warp has 16 rows. For each octet of columns of a product, lane 4g + t holds columns 2t and 2t+1 of row g and then
// of row g + 8. This is the layout of tensor cores; float32, which is summed without them, uses the same layout.
#pragma once

#include "attn/cuda/tile.cuh"

namespace conddetr::attn {

// Sixteen rows of a tile from `first` on, as the left operand of a product.
template <typename T>
struct Fragment {
  uint32_t part[2][4];

  __device__ __forceinline__ Fragment(Tile<T> tile, int first) {
    const int lane = threadIdx.x % kLanes, row = first + lane % 16;
#pragma unroll
    for (int step = 0; step < 2; ++step) load_matrices<false>(part[step], tile.chunk(row, 2 * step + lane / 16));
  }
};

// Float32 is read from the tile at each use, so the tile must stay.
template <>
struct Fragment<float> {
  Tile<float> tile;
  int first;

  __device__ __forceinline__ Fragment(Tile<float> tile, int first) : tile(tile), first(first) {}
};

// sum[16, 8 N] += left[16, 32] · (8 N rows of the tile, from `first` on)ᵀ
template <int N, typename T>
__device__ __forceinline__ void multiply_rows(float (&sum)[N][4], const Fragment<T>& left, Tile<T> tile, int first) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int octet = 0; octet < N; ++octet) {
    uint32_t right[4];
    load_matrices<false>(right, tile.chunk(first + 8 * octet + lane % 8, lane / 8));
    multiply<T>(sum[octet], left.part[0], right[0], right[1]);
    multiply<T>(sum[octet], left.part[1], right[2], right[3]);
  }
}

// Float32 sums eight products before it adds them to the total: the error grows more slowly.
template <int N>
__device__ __forceinline__ void multiply_rows(float (&sum)[N][4], const Fragment<float>& left, Tile<float> tile,
                                              int first) {
  const int g = threadIdx.x % kLanes / 4, t = threadIdx.x % 4;
#pragma unroll 1  // unrolled it would hoist loads until registers spill
  for (int pair = 0; pair < Tile<float>::kChunks; pair += 2) {
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) {
      const int octet = i / 4, row = i / 2 % 2, column = i % 2;
      float part = 0;
#pragma unroll
      for (int chunk = pair; chunk < pair + 2; ++chunk) {
        const float4 a = *reinterpret_cast<const float4*>(left.tile.chunk(left.first + g + 8 * row, chunk));
        const float4 b = *reinterpret_cast<const float4*>(tile.chunk(first + 8 * octet + 2 * t + column, chunk));
        part += a.x * b.x;
        part += a.y * b.y;
        part += a.z * b.z;
        part += a.w * b.w;
      }
      sum[octet][2 * row + column] += part;
    }
  }
}

// sum[16, 32] += left[16, 16] · (rows `first` to `first` + 15 of the tile); left is rounded to T.
template <typename T>
__device__ __forceinline__ void multiply_columns(float (&sum)[4][4], const float (&left)[2][4], Tile<T> tile,
                                                 int first) {
  const int lane = threadIdx.x % kLanes;
  const uint32_t packed[4] = {pack<T>(left[0][0], left[0][1]), pack<T>(left[0][2], left[0][3]),
                              pack<T>(left[1][0], left[1][1]), pack<T>(left[1][2], left[1][3])};
#pragma unroll
  for (int chunk = 0; chunk < 4; chunk += 2) {
    uint32_t right[4];
    load_matrices<true>(right, tile.chunk(first + lane % 16, chunk + lane / 16));
    multiply<T>(sum[chunk], packed, right[0], right[1]);
    multiply<T>(sum[chunk + 1], packed, right[2], right[3]);
  }
}

// Float32 sums 16 products before it adds them to the total, as above.
template <>
__device__ __forceinline__ void multiply_columns<float>(float (&sum)[4][4], const float (&left)[2][4], Tile<float> tile,
                                                        int first) {
  const int lane = threadIdx.x % kLanes, t = lane % 4;
  float part[4][4] = {};
#pragma unroll 1  // likewise
  for (int owner = 0; owner < 4; ++owner) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int octet = i / 2, column = i % 2, row = first + 8 * octet + 2 * owner + column;
      const float upper = from_lane(left[octet][column], lane - t + owner);
      const float lower = from_lane(left[octet][2 + column], lane - t + owner);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 right = *reinterpret_cast<const float2*>(tile.at(row, 8 * j + 2 * t));
        part[j][0] += upper * right.x;
        part[j][1] += upper * right.y;
        part[j][2] += lower * right.x;
        part[j][3] += lower * right.y;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] += part[i / 4][i % 4];
}

}  // namespace conddetr::attn
