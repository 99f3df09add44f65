// Gradients of keys and values, on any GPU.
#pragma once

#include "attn/cuda/backward_query.cuh"

namespace conddetr::attn {

// Queries of one image and head as they go by, tile after tile, with what belongs to a tile of keys. Tile i is in stage
// i % 2. Past the last query all is zero: weights then count, but nothing that they are multiplied with.
template <typename T>
struct QueryTiles {
  static constexpr int kStages = 2;
  static constexpr int64_t kBytes = kStages * (3 * int64_t(Tile<T>::kBytes) + 4 * kTile * int64_t(sizeof(float)));

  Part<T> part;
  Source<T> q_content, q_spatial, grad;
  Tile<T> content, spatial, gradient;
  float *lse, *delta;  // [stages, 64]
  uint32_t* keep;      // [stages, 2, 64], of the halves of the tile of keys
  // The first 64 threads copy lse and the first half's bits, the others delta and the second half's.
  int half, slot;
  const float* words;
  const uint32_t* keep_words;  // or null
  int queries;
  float log2_scale;

  __device__ QueryTiles(const Problem<T>& p, const Upstream<T>& upstream, int image, int head, int tile, Shared& shared)
      : q_content(p.q_content, image, head, part),
        q_spatial(p.q_spatial, image, head, part),
        grad(upstream.grad + (int64_t(image) * p.queries * p.heads + head) * kWidth, int64_t(p.heads) * kWidth, part),
        content(shared.tile<T>(kStages)),
        spatial(shared.tile<T>(kStages)),
        gradient(shared.tile<T>(kStages)),
        lse(shared.take<float>(kStages * kTile)),
        delta(shared.take<float>(kStages * kTile)),
        keep(shared.take<uint32_t>(kStages * 2 * kTile)),
        half(threadIdx.x / kTile),
        slot(threadIdx.x % kTile),
        words((half ? upstream.delta : upstream.lse) + p.query_index(image, head, 0)),
        keep_words(p.keep ? p.keep_of(image, head, tile) + half * p.queries : nullptr),
        queries(p.queries),
        log2_scale(p.log2_scale) {}

  // Starts to copy a tile.
  __device__ __forceinline__ void load(int tile, int stage) {
    const int first = tile * kTile, query = first + slot;
    load_queries(content.stage(stage), q_content, first, queries, part);
    load_queries(spatial.stage(stage), q_spatial, first, queries, part);
    load_queries(gradient.stage(stage), grad, first, queries, part);
    copy_word_async((half ? delta : lse) + stage * kTile + slot, words + query, query < queries);
    if (!keep_words) return;
    copy_word_async(keep + (2 * stage + half) * kTile + slot, keep_words + query, query < queries);
  }

  // Of scores [8 · octets, 4], from query `first` of a stage on: weights on return, for a warp's rows of keys.
  template <int kOctets>
  __device__ __forceinline__ void weigh(float (&scores)[kOctets][4], int stage, int first, const Lane& lane) const {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const float2 minus = *reinterpret_cast<const float2*>(lse + stage * kTile + first + 8 * octet + 2 * lane.t);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[octet][i] = exp2_fast(scores[octet][i] * log2_scale - (i % 2 ? minus.y : minus.x));
      }
    }
  }

  // Turns weights into those that dropout keeps, and their gradients into those of scores; see backward_query.cuh.
  template <int kOctets>
  __device__ __forceinline__ void differentiate(float (&weights)[kOctets][4], float (&grads)[kOctets][4], int stage,
                                                int first, const Lane& lane) const {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const int query = first + 8 * octet + 2 * lane.t;
      const float2 minus = *reinterpret_cast<const float2*>(delta + stage * kTile + query);
      uint2 kept{~0u, ~0u};
      if (keep_words) kept = *reinterpret_cast<const uint2*>(keep + (2 * stage + lane.warp / 2) * kTile + query);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float without = weights[octet][i] * (i % 2 ? minus.y : minus.x);
        const uint32_t bits = (i % 2 ? kept.y : kept.x) >> (lane.warp % 2 * kWarpRows + lane.g);
        weights[octet][i] = has_bit(bits, i / 2 * 8) ? weights[octet][i] : 0.0f;
        grads[octet][i] = weights[octet][i] * grads[octet][i] - without;
      }
    }
  }
};

// Loads a tile of keys; separable spatial ones are built.
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

// A block's tile of keys, as rows, and the queries that go by. Weights of keys that are not seen only reach their own
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

  // Loads the keys and starts with the queries. Ends with a barrier.
  __device__ void begin() {
    if (blocks == 0) return;
    load_key_tile<T, kSeparable>(content, spatial, values, p, image, head, keys, tile);
    queries.load(0, 0);
    end_group();
    wait_group<0>();
    barrier();
  }

  // Writes all the grid's keys of this tile, those outside the rectangle too.
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

// Of content keys, spatial keys (dense ones, or what separable ones stand for) and values, contiguous [batch, keys,
// heads, 32]. A block has one tile of keys, a warp 16 of them as rows; queries go by as columns, in tiles, two in
// flight.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_key_kernel(Problem<T> p, Upstream<T> upstream, T* grad_content, T* grad_spatial, T* grad_v) {
  const Lane lane;
  Shared shared;
  KeyRows<T, kSeparable> rows(p, upstream, blockIdx.z, blockIdx.y, blockIdx.x, shared);
  rows.begin();
  const Fragment<T> content(rows.content, lane.first_row()), conditional(rows.spatial, lane.first_row());
  const Fragment<T> value(rows.values, lane.first_row());
  QueryTiles<T>& queries = rows.queries;
  float by_content[4][4], by_spatial[4][4], by_value[4][4];
  clear(by_content);
  clear(by_spatial);
  clear(by_value);
  for (int block = 0; block < rows.blocks; ++block) {
    wait_group<0>();
    barrier();  // this tile is there, and nobody reads the other
    const int stage = block % 2;
    if (block + 1 < rows.blocks) queries.load(block + 1, 1 - stage);
    end_group();
    const Tile<T> q_content = queries.content.stage(stage), q_spatial = queries.spatial.stage(stage);
    const Tile<T> gradient = queries.gradient.stage(stage);
#pragma unroll kUnrolledGroups<T>
    for (int group = 0; group < 4; ++group) {
      float weights[2][4], grads[2][4];
      clear(weights);
      clear(grads);
      multiply_rows(weights, conditional, q_spatial, 16 * group);
      multiply_rows(weights, content, q_content, 16 * group);
      multiply_rows(grads, value, gradient, 16 * group);
      queries.weigh(weights, stage, 16 * group, lane);
      queries.differentiate(weights, grads, stage, 16 * group, lane);
      multiply_columns(by_value, weights, gradient, 16 * group);
      multiply_columns(by_content, grads, q_content, 16 * group);
      multiply_columns(by_spatial, grads, q_spatial, 16 * group);
    }
  }
  rows.store(grad_content, by_content, p.scale / p.drop_factor, lane);
  rows.store(grad_spatial, by_spatial, p.scale / p.drop_factor, lane);
  rows.store(grad_v, by_value, 1 / p.drop_factor, lane);
}

}  // namespace conddetr::attn
