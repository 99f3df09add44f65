// Tiles in shared memory: their layout, and copies from and to a tensor. A warp has 16 rows.
#pragma once

#include "attn/cuda/keys.h"
#include "common/portable.h"
#include "common/warp.cuh"

namespace conddetr::attn {

constexpr int kWidth = 32;  // channels of a head
constexpr int kWarpRows = 16;
constexpr int kThreads = kTile / kWarpRows * kLanes;

// [64, 32] in shared memory, or several such tiles one after the other. Rows are split into chunks of 16 bytes, and
// chunk c of row r is stored in the slot of chunk c ^ (r, or r / 2 for the four chunks of a 16-bit row). Eight rows of
// one chunk are then in eight different groups of four banks, and so are the rows that a copy writes at a time. For
// 16-bit numbers this is Hopper's 64-byte swizzle.
template <typename T>
struct Tile {
  static constexpr int kPerChunk = 16 / int(sizeof(T));
  static constexpr int kChunks = kWidth / kPerChunk;
  static constexpr int kBytes = kTile * kWidth * int(sizeof(T));

  T* data;

  CONDDETR_BOTH T* chunk(int row, int chunk) const {
    const int turn = kChunks == 8 ? row : row / 2;
    return data + row * kWidth + (chunk ^ (turn & (kChunks - 1))) * kPerChunk;
  }
  CONDDETR_BOTH T* at(int row, int channel) const { return chunk(row, channel / kPerChunk) + channel % kPerChunk; }
  CONDDETR_BOTH Tile stage(int index) const { return {data + index * (kTile * kWidth)}; }
};

// Starts copying row `item_of(r)` of a tensor into row r of the tile; zeros if `item_of(r)` is negative.
template <typename T, typename ItemOf>
__device__ __forceinline__ void load_tile(Tile<T> tile, const T* base, int64_t stride, ItemOf item_of) {
  constexpr int kChunks = Tile<T>::kChunks;
#pragma unroll
  for (int i = 0; i < kTile * kChunks / kThreads; ++i) {
    const int index = i * kThreads + threadIdx.x, row = index / kChunks, chunk = index % kChunks;
    const int64_t item = item_of(row);
    copy_async(tile.chunk(row, chunk), base + (item < 0 ? 0 : item * stride) + chunk * Tile<T>::kPerChunk, item >= 0);
  }
}

// Writes 16 rows of a warp to row `item_of(row)` of a tensor, through rows `first` on of a tile that no other warp
// uses; skips rows for which it is negative.
template <typename T, typename ItemOf>
__device__ __forceinline__ void store_rows(T* base, int64_t stride, const float (&value)[4][4], Tile<T> tile, int first,
                                           ItemOf item_of) {
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  warp_barrier();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *tile.at(first + g + 8 * (i / 2), 8 * j + 2 * t + i % 2) = from_float<T>(value[j][i]);
    }
  }
  warp_barrier();
  constexpr int kChunks = Tile<T>::kChunks;
#pragma unroll
  for (int i = 0; i < kWarpRows * kChunks / kLanes; ++i) {
    const int index = i * kLanes + lane, row = first + index / kChunks, chunk = index % kChunks;
    const int64_t item = item_of(row);
    if (item < 0) continue;
    *reinterpret_cast<uint4*>(base + item * stride + chunk * Tile<T>::kPerChunk) =
        *reinterpret_cast<const uint4*>(tile.chunk(row, chunk));
  }
}

}  // namespace conddetr::attn
