// A block's keys in backward.
#pragma once

#include "attn/cuda/query_tiles.cuh"

namespace conddetr::attn {

// Loads a tile of keys; builds separable spatial ones.
template <typename T, bool kSeparable>
__device__ __forceinline__ void load_key_tile(Tile<T> content, Tile<T> spatial, Tile<T> values, const Problem<T>& p,
                                              int image, int head, const Keys& keys, int tile) {
  const auto item_of = [&](int slot) -> int64_t {
    const int ordinal = tile * kTile + slot;
    return ordinal < keys.count() ? keys.item(ordinal) : -1;
  };
  load_tile(content, p.k_content.of(image, head), p.k_content.item, item_of);
  load_tile(values, p.v.of(image, head), p.v.item, item_of);
  if constexpr (!kSeparable) {
    load_tile(spatial, p.spatial.of(image, head), p.spatial.item, item_of);
  } else {
    constexpr int kChunks = Tile<T>::kChunks;
    const T *rows = p.spatial.of(image, head), *columns = p.columns.of(image, head);
#pragma unroll
    for (int i = 0; i < kTile * kChunks / kThreads; ++i) {
      const int index = i * kThreads + threadIdx.x, slot = index / kChunks, chunk = index % kChunks;
      const int64_t item = item_of(slot), y = item / p.width, x = item - y * p.width;
      if (item < 0) {
        write_chunk(spatial.chunk(slot, chunk), uint4{0, 0, 0, 0});
      } else {
        const int channel = chunk * Tile<T>::kPerChunk;
        write_chunk(spatial.chunk(slot, chunk),
                    sum_of(rows + y * p.spatial.item + channel, columns + x * p.columns.item + channel));
      }
    }
  }
}

// A block's tile of keys, as rows, and the queries that it loops over. Weights of invisible keys affect only their own
// rows, which become zeros.
template <typename T, bool kSeparable>
struct KeyRows {
  static constexpr int64_t kBytes = 3 * int64_t(Tile<T>::kBytes) + QueryTiles<T>::kBytes;

  const Problem<T>& p;
  int image, head, tile;
  Keys keys;
  Tile<T> content, spatial, values;
  QueryTiles<T> queries;
  int blocks;  // of queries

  __device__ KeyRows(const Problem<T>& p, const Upstream<T>& upstream, int image, int head, int tile, Shared& shared)
      : p(p),
        image(image),
        head(head),
        tile(tile),
        keys(p.keys_of(image)),
        content(shared.tile<T>()),
        spatial(shared.tile<T>()),
        values(shared.tile<T>()),
        queries(p, upstream, image, head, tile, shared),
        blocks(tile < keys.tiles() ? (p.queries + kTile - 1) / kTile : 0) {}

  // Loads the keys and the first queries. Ends with a barrier.
  __device__ void begin() {
    if (blocks == 0) return;
    load_key_tile<T, kSeparable>(content, spatial, values, p, image, head, keys, tile);
    queries.load(0, 0);
    end_group();
    wait_group<0>();
    barrier();
  }

  // Writes all keys of this tile, including those outside the rectangle.
  __device__ void store(T* target, float (&sums)[4][4], float factor, const Lane& lane) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const bool is_seen = is_visible(p, image, keys, tile * kTile + lane.first_row() + lane.g + 8 * row);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& sum = sums[i / 2][2 * row + i % 2];
        sum = is_seen ? sum * factor : 0.0f;
      }
    }
    const int64_t stride = int64_t(p.heads) * kWidth;
    store_rows(target + int64_t(image) * p.keys * stride + head * kWidth, stride, sums, content, lane.first_row(),
               [=, this](int slot) -> int64_t {
                 const int ordinal = tile * kTile + slot;
                 return ordinal < p.keys ? keys.item(ordinal) : -1;
               });
  }
};

}  // namespace conddetr::attn
