// Copies of queries and keys to shared memory.
#pragma once

#include "attn/cuda/problem.cuh"

namespace conddetr::attn {

// A thread's part of tiles: a chunk of 16 bytes in each of a few rows.
template <typename T>
struct Part {
  static constexpr int kStep = kThreads / Tile<T>::kChunks, kRows = kTile / kStep;
  static_assert(kStep % 8 == 0, "the swizzle of a tile repeats every eight rows");
  int row, chunk;  // the first row, and others kStep apart

  __device__ Part() : row(threadIdx.x / Tile<T>::kChunks), chunk(threadIdx.x % Tile<T>::kChunks) {}
  __device__ int in_lines() const { return chunk * Tile<T>::kPerChunk; }
  __device__ T* of(Tile<T> tile, int index) const { return tile.chunk(row, chunk) + index * kStep * kWidth; }
};

// The thread's chunk in the items of a tensor, of one image and head.
template <typename T>
struct Source {
  const char* data;
  int item_bytes;

  __device__ Source(const T* base, int64_t stride, const Part<T>& part)
      : data(reinterpret_cast<const char*>(base + part.in_lines())), item_bytes(int(stride * sizeof(T))) {}
  __device__ Source(const Rows<T>& rows, int image, int head, const Part<T>& part)
      : Source(rows.of(image, head), rows.item, part) {}

  // Starts copying it; zeros if not `inside`.
  __device__ __forceinline__ void copy(T* target, int item, bool inside) const {
    copy_async(target, data + int64_t(item) * item_bytes, inside);
  }
};

// Starts copying a tile of queries; zeros past the last query.
template <typename T>
__device__ __forceinline__ void load_queries(Tile<T> tile, const Source<T>& source, int first, int queries,
                                             const Part<T>& part) {
#pragma unroll
  for (int i = 0; i < Part<T>::kRows; ++i) {
    const int query = first + part.row + i * Part<T>::kStep;
    source.copy(part.of(tile, i), query, query < queries);
  }
}

// Flips the signs of the thread's part of a tile of 16-bit numbers.
template <typename T>
__device__ __forceinline__ void negate(Tile<T> tile, const Part<T>& part) {
  constexpr uint32_t kSigns = 0x80008000u;
#pragma unroll
  for (int i = 0; i < Part<T>::kRows; ++i) {
    const uint4 chunk = *reinterpret_cast<const uint4*>(part.of(tile, i));
    write_chunk(part.of(tile, i), uint4{chunk.x ^ kSigns, chunk.y ^ kSigns, chunk.z ^ kSigns, chunk.w ^ kSigns});
  }
}

}  // namespace conddetr::attn
