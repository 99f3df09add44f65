// How queries and keys come into shared memory.
#pragma once

#include "attn/problem.cuh"

namespace conddetr::attn {

// A tile of 64 queries, or two with 128, of one image and head; zeros past the last query.
template <int kQueries = kTile, typename T>
__device__ __forceinline__ void load_queries(Tile<T> tile, const T* base, int64_t stride, int first, int queries) {
  load_tile<kQueries>(tile, base, stride, [=](int row) -> int64_t { return first + row < queries ? first + row : -1; });
}

// Bytes of the rows and columns that `KeyTiles` keeps.
template <typename T>
constexpr int64_t line_bytes(int64_t height, int64_t width) {
  return (height + width) * kWidth * int64_t(sizeof(T));
}

// Keys of one image and head, tile after tile: content keys, values and spatial keys. Tile i is in stage i % 2. Separable
// spatial keys are built, rows[y] + columns[x], once for each key: rounded to T, as dense keys are.
template <typename T, bool kSeparable, int kBlockThreads>
struct KeyTiles {
  static constexpr int kStages = 2, kStep = kBlockThreads / Tile<T>::kChunks;

  const Problem<T>& p;
  const T *k_content, *k_spatial, *v;
  Tile<T> content, values, spatial;
  T *rows, *columns;
  int chunk;
  Cursor cursor;  // of the thread's first key of the next tile to load

  __device__ KeyTiles(const Problem<T>& p, int image, int head, const Keys& keys, Shared& shared)
      : p(p),
        k_content(p.k_content.of(image, head)),
        k_spatial(p.spatial.of(image, head)),
        v(p.v.of(image, head)),
        content(shared.tile<T>(kStages)),
        values(shared.tile<T>(kStages)),
        spatial(shared.tile<T>(kStages)),
        rows(shared.take<T>(kSeparable ? keys.valid.height * kWidth : 0)),
        columns(shared.take<T>(kSeparable ? keys.valid.width * kWidth : 0)),
        chunk(threadIdx.x % Tile<T>::kChunks),
        cursor(keys, threadIdx.x / Tile<T>::kChunks, kStep) {}

  static __device__ int slot(int part) { return part * kStep + threadIdx.x / Tile<T>::kChunks; }

  // Starts to copy the first tile, and what spatial keys are built of.
  __device__ void begin(int image, int head) {
    copy(0, cursor);
    if constexpr (kSeparable) {
      copy_lines(rows, k_spatial, p.spatial.item, cursor.height);
      copy_lines(columns, p.columns.of(image, head), p.columns.item, cursor.width);
    }
  }

  // Builds the first tile's spatial keys, once the block has what `begin` copied.
  __device__ void finish_first() { cursor = build(0, cursor); }

  // Starts to copy the next tile.
  __device__ void load(int tile) {
    copy(tile % kStages, cursor);
    cursor = build(tile % kStages, cursor);
  }

  __device__ void copy(int stage, Cursor at) const {
#pragma unroll
    for (int part = 0; part < kTile / kStep; ++part, at.next()) {
      const int64_t item = at.is_inside() ? at.y * p.width + at.x : 0;
      copy_chunk(content.stage(stage), part, k_content + item * p.k_content.item, at.is_inside());
      copy_chunk(values.stage(stage), part, v + item * p.v.item, at.is_inside());
      if constexpr (!kSeparable) {
        copy_chunk(spatial.stage(stage), part, k_spatial + item * p.spatial.item, at.is_inside());
      }
    }
  }

  // Zeros outside: what is there must not be a NaN.
  __device__ Cursor build(int stage, Cursor at) const {
    const int first = chunk * Tile<T>::kPerChunk;
#pragma unroll
    for (int part = 0; part < kTile / kStep; ++part, at.next()) {
      if constexpr (kSeparable) {
        T* target = spatial.stage(stage).chunk(slot(part), chunk);
        if (at.is_inside()) {
          write_sum(target, rows + at.y * kWidth + first, columns + at.x * kWidth + first);
        } else {
          write_zeros(target);
        }
      }
    }
    return at;
  }

  __device__ void copy_chunk(Tile<T> tile, int part, const T* from, bool is_inside) const {
    copy_async(tile.chunk(slot(part), chunk), from + chunk * Tile<T>::kPerChunk, is_inside);
  }

  __device__ void copy_lines(T* lines, const T* base, int64_t stride, int count) const {
    for (int line = threadIdx.x / Tile<T>::kChunks; line < count; line += kStep) {
      const int channel = chunk * Tile<T>::kPerChunk;
      copy_async(lines + line * kWidth + channel, base + line * stride + channel, true);
    }
  }
};

}  // namespace conddetr::attn
