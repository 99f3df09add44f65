// The keys that a block loops over, tile after tile.
#pragma once

#include "attn/cuda/load.cuh"

namespace conddetr::attn {

// Bytes of the rows and columns that `KeyTiles` keeps.
template <typename T>
constexpr int64_t line_bytes(int64_t height, int64_t width) {
  return (height + width) * kWidth * int64_t(sizeof(T));
}

// Keys of one image and head, tile after tile, in two stages. Separable spatial keys are built, rows[y] + columns[x],
// once for each key: rounded to T, as dense keys are.
template <typename T, bool kSeparable>
struct KeyTiles {
  static constexpr int kStages = 2;

  Part<T> part;
  Source<T> k_content, k_spatial, v;
  Tile<T> content, values, spatial;
  T *rows, *columns;
  int grid_width;
  Cursor first, cursor;       // at the thread's first key, and at its first key of the next tile to load
  int items[Part<T>::kRows];  // the thread's items in the last tile of keys; negative outside the rectangle

  __device__ KeyTiles(const Problem<T>& p, int image, int head, const Keys& keys, Shared& shared)
      : k_content(p.k_content, image, head, part),
        k_spatial(p.spatial, image, head, part),
        v(p.v, image, head, part),
        content(shared.tile<T>(kStages)),
        values(shared.tile<T>(kStages)),
        spatial(shared.tile<T>(kStages)),
        rows(shared.take<T>(kSeparable ? keys.valid.height * kWidth : 0)),
        columns(shared.take<T>(kSeparable ? keys.valid.width * kWidth : 0)),
        grid_width(p.width),
        first(keys, part.row, Part<T>::kStep),
        cursor(first) {}

  // Starts copying the first tile, and the rows and columns of separable spatial keys.
  __device__ void begin(const Problem<T>& p, int image, int head) {
    copy_keys(0);
    copy_values(0);
    if constexpr (kSeparable) {
      copy_lines(rows, k_spatial, cursor.height);
      copy_lines(columns, Source<T>(p.columns, image, head, part), cursor.width);
    }
  }

  // Builds the first tile's spatial keys, after the copies of `begin` have arrived.
  __device__ void finish_first() { build(0, first); }

  // Starts copying the next tile.
  __device__ __forceinline__ void load(int stage) {
    build(stage, cursor);
    copy_keys(stage);
    copy_values(stage);
  }

  // The same without its values, and key by key, while `load` builds all keys before it copies any. This way the
  // forward kernel for Hopper fits its registers; the others need fewer instructions with `load`.
  __device__ __forceinline__ void load_keys(int stage) {
    uint4 sums[Part<T>::kRows];
#pragma unroll
    for (int i = 0; i < Part<T>::kRows; ++i, cursor.next()) {
      copy_key(stage, i);
      if constexpr (kSeparable) sums[i] = spatial_at(cursor);
    }
    if constexpr (kSeparable) write_spatial(stage, sums);
  }

  // Copies content keys, and dense spatial ones.
  __device__ __forceinline__ void copy_keys(int stage) {
#pragma unroll
    for (int i = 0; i < Part<T>::kRows; ++i, cursor.next()) copy_key(stage, i);
  }

  // Copies the key at the cursor to the thread's row `index` of the tile.
  __device__ __forceinline__ void copy_key(int stage, int index) {
    const bool inside = cursor.is_inside();
    items[index] = inside ? cursor.y * grid_width + cursor.x : -1;
    k_content.copy(part.of(content.stage(stage), index), items[index], inside);
    if constexpr (!kSeparable) k_spatial.copy(part.of(spatial.stage(stage), index), items[index], inside);
  }

  // Copies the values of the last keys.
  __device__ __forceinline__ void copy_values(int stage) const {
#pragma unroll
    for (int i = 0; i < Part<T>::kRows; ++i) v.copy(part.of(values.stage(stage), i), items[i], items[i] >= 0);
  }

  __device__ __forceinline__ void build(int stage, Cursor at) const {
    if constexpr (kSeparable) {
      uint4 sums[Part<T>::kRows];
#pragma unroll
      for (int i = 0; i < Part<T>::kRows; ++i, at.next()) sums[i] = spatial_at(at);
      write_spatial(stage, sums);
    }
  }

  // A separable spatial key; outside, one of the last row: no weight counts there, but it must not become NaN.
  __device__ __forceinline__ uint4 spatial_at(const Cursor& at) const {
    const int y = at.y < at.height ? at.y : at.height - 1;
    return sum_of(rows + y * kWidth + part.in_lines(), columns + at.x * kWidth + part.in_lines());
  }

  __device__ __forceinline__ void write_spatial(int stage, const uint4 (&sums)[Part<T>::kRows]) const {
#pragma unroll
    for (int i = 0; i < Part<T>::kRows; ++i) write_chunk(part.of(spatial.stage(stage), i), sums[i]);
  }

  __device__ void copy_lines(T* lines, const Source<T>& source, int count) const {
    for (int line = part.row; line < count; line += Part<T>::kStep) {
      source.copy(lines + line * kWidth + part.in_lines(), line, true);
    }
  }
};

}  // namespace conddetr::attn
