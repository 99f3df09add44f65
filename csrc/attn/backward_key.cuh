// Gradients of keys and values, on any GPU.
#pragma once

#include "attn/backward_query.cuh"

namespace conddetr::attn {

// Queries of one image and head as they go by, tile after tile, with what belongs to a tile of keys. Tile i is in stage
// i % 2. Past the last query all is zero: weights then count, but nothing that they are multiplied with.
template <typename T>
struct QueryTiles {
  static constexpr int kStages = 2;
  static constexpr int64_t kBytes = kStages * (3 * int64_t(Tile<T>::kBytes) + 4 * kTile * int64_t(sizeof(float)));

  const Problem<T>& p;
  const T *q_content, *q_spatial, *grad;
  int64_t stride;  // of grad
  const float *all_lse, *all_delta;
  const uint32_t* all_keep;
  Tile<T> content, spatial, gradient;
  float *lse, *delta;  // [stages, 64]
  uint32_t* keep;      // [stages, 2, 64], of the halves of the tile of keys

  __device__ QueryTiles(const Problem<T>& p, const Upstream<T>& upstream, int image, int head, int tile, Shared& shared)
      : p(p),
        q_content(p.q_content.of(image, head)),
        q_spatial(p.q_spatial.of(image, head)),
        grad(upstream.grad + (int64_t(image) * p.queries * p.heads + head) * kWidth),
        stride(int64_t(p.heads) * kWidth),
        all_lse(upstream.lse + p.query_index(image, head, 0)),
        all_delta(upstream.delta + p.query_index(image, head, 0)),
        all_keep(p.keep ? p.keep_of(image, head, tile) : nullptr),
        content(shared.tile<T>(kStages)),
        spatial(shared.tile<T>(kStages)),
        gradient(shared.tile<T>(kStages)),
        lse(shared.take<float>(kStages * kTile)),
        delta(shared.take<float>(kStages * kTile)),
        keep(shared.take<uint32_t>(kStages * 2 * kTile)) {}

  // Starts to copy a tile.
  __device__ void load(int tile) {
    const int first = tile * kTile, stage = tile % kStages;
    load_queries(content.stage(stage), q_content, p.q_content.item, first, p.queries);
    load_queries(spatial.stage(stage), q_spatial, p.q_spatial.item, first, p.queries);
    load_queries(gradient.stage(stage), grad, stride, first, p.queries);
    const int half = threadIdx.x / kTile, slot = threadIdx.x % kTile, query = first + slot;
    const bool is_inside = query < p.queries;
    const int64_t from = is_inside ? query : 0;
    copy_word_async((half ? delta : lse) + stage * kTile + slot, (half ? all_delta : all_lse) + from, is_inside);
    if (!p.keep) return;
    copy_word_async(keep + (2 * stage + half) * kTile + slot, all_keep + half * p.queries + from, is_inside);
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
      const int64_t item = item_of(slot);
      if (item < 0) {
        write_zeros(spatial.chunk(slot, chunk));
      } else {
        const int64_t y = item / p.width, x = item - y * p.width, channel = chunk * Tile<T>::kPerChunk;
        write_sum(spatial.chunk(slot, chunk), rows + y * p.spatial.item + channel, columns + x * p.columns.item + channel);
      }
    }
  }
}

// Zeros the rows of keys that are not seen, scales the others and writes them all, those outside the rectangle too.
template <typename T>
__device__ __forceinline__ void store_keys(T* target, float (&sums)[4][4], const bool (&is_seen)[2], float factor,
                                           Tile<T> staging, const Problem<T>& p, int image, int head, const Keys& keys,
                                           int tile, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = is_seen[i / 2 % 2] ? sums[i / 4][i % 4] * factor : 0.0f;
  const int64_t stride = int64_t(p.heads) * kWidth;
  store_rows(target + int64_t(image) * p.keys * stride + head * kWidth, stride, sums, staging, lane.first_row(),
             [&](int slot) -> int64_t {
               const int ordinal = tile * kTile + slot;
               return ordinal < p.keys ? keys.item(ordinal) : -1;
             });
}

// Of content keys, spatial keys (dense ones, or what separable ones stand for) and values, contiguous [batch, keys,
// heads, 32]. A block has one tile of keys, a warp 16 of them as rows; queries go by as columns. Weights of keys that are
// not seen only reach their own rows, which become zeros.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_key_kernel(Problem<T> p, Upstream<T> upstream, T* grad_content, T* grad_spatial, T* grad_v) {
  const int tile = blockIdx.x, head = blockIdx.y, image = blockIdx.z;
  const Keys keys = p.keys_of(image);
  const Lane lane;
  Shared shared;
  const Tile<T> k_content = shared.tile<T>(), k_spatial = shared.tile<T>(), values = shared.tile<T>();
  QueryTiles<T> queries(p, upstream, image, head, tile, shared);
  float by_content[4][4], by_spatial[4][4], by_value[4][4];
  clear(by_content);
  clear(by_spatial);
  clear(by_value);
  bool is_seen[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    is_seen[row] = is_visible(p, image, keys, tile * kTile + lane.first_row() + lane.g + 8 * row);
  }

  const int blocks = tile < keys.tiles() ? (p.queries + kTile - 1) / kTile : 0;
  if (blocks > 0) {
    load_key_tile<T, kSeparable>(k_content, k_spatial, values, p, image, head, keys, tile);
    queries.load(0);
    end_group();
    wait_group<0>();
    barrier();
  }
  const Fragment<T> content(k_content, lane.first_row()), conditional(k_spatial, lane.first_row());
  const Fragment<T> value(values, lane.first_row());
  for (int block = 0; block < blocks; ++block) {
    wait_group<0>();
    barrier();  // this tile is there, and nobody reads the other
    if (block + 1 < blocks) queries.load(block + 1);
    end_group();
    const int at = block % 2;
    const Tile<T> q_content = queries.content.stage(at), q_spatial = queries.spatial.stage(at);
    const Tile<T> gradient = queries.gradient.stage(at);
    const float *lse = queries.lse + at * kTile, *delta = queries.delta + at * kTile;
    const uint32_t* keep = queries.keep + (2 * at + lane.warp / 2) * kTile;
#pragma unroll kUnrolledGroups<T>
    for (int group = 0; group < 4; ++group) {
      float scores[2][4], grad_weights[2][4], kept_weights[2][4], by_score[2][4];
      clear(scores);
      clear(grad_weights);
      multiply_rows(scores, conditional, q_spatial, 16 * group);
      multiply_rows(scores, content, q_content, 16 * group);
      multiply_rows(grad_weights, value, gradient, 16 * group);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = i / 2 % 2, query = 16 * group + i / 4 * 8 + 2 * lane.t + i % 2;
        const float weight = exp2_fast(scores[i / 4][i % 4] * p.log2_scale - lse[query]);
        const uint32_t bits = p.keep ? keep[query] >> (lane.warp % 2 * kWarpRows + lane.g) : ~0u;
        const float kept = has_bit(bits, 8 * row) ? weight : 0.0f;
        kept_weights[i / 4][i % 4] = kept;
        by_score[i / 4][i % 4] = kept * grad_weights[i / 4][i % 4] - weight * delta[query];
      }
      multiply_columns(by_value, kept_weights, gradient, 16 * group);
      multiply_columns(by_content, by_score, q_content, 16 * group);
      multiply_columns(by_spatial, by_score, q_spatial, 16 * group);
    }
  }

  const float factor = 1 / p.drop_factor;
  store_keys(grad_content, by_content, is_seen, factor * p.scale, k_content, p, image, head, keys, tile, lane);
  store_keys(grad_spatial, by_spatial, is_seen, factor * p.scale, k_spatial, p, image, head, keys, tile, lane);
  store_keys(grad_v, by_value, is_seen, factor, values, p, image, head, keys, tile, lane);
}

template <typename T>
constexpr int64_t backward_key_bytes = 3 * int64_t(Tile<T>::kBytes) + QueryTiles<T>::kBytes;

}  // namespace conddetr::attn
