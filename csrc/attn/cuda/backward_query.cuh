// Gradients of both queries, on any GPU, and delta.
//
// A score's gradient is weight · (grad_weight - delta), times the scale. With dropout the weight's own gradient counts
// only where the weight was kept, times 1 / (1 - p): that factor and the scale come last, and delta without the factor.
#pragma once

#include "attn/cuda/load.cuh"
#include "attn/cuda/masks.cuh"

namespace conddetr::attn {

__device__ __forceinline__ float score_gradient(float weight, float grad_weight, float delta, bool is_kept) {
  const float without = -weight * delta;
  return is_kept ? weight * grad_weight + without : without;
}

// lse and delta of a warp's queries, of rows g and g + 8; the latter from tiles of the output and its gradient, and
// kept for the gradients of keys. Rows past the last query have no weights.
template <typename T>
struct RowSums {
  float lse[2], delta[2];

  __device__ RowSums(const Problem<T>& p, const Upstream<T>& upstream, Tile<T> gradient, Tile<T> out, int image,
                     int head, int first, const Lane& lane) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int in_tile = lane.first_row() + lane.g + 8 * row, query = first + in_tile;
      float part = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int channel = 8 * lane.t + i;
        part += to_float(*gradient.at(in_tile, channel)) * to_float(*out.at(in_tile, channel));
      }
      part += from_lane_xor(part, 1);
      delta[row] = (part + from_lane_xor(part, 2)) * p.drop_factor;
      lse[row] = query < p.queries ? upstream.lse[p.query_index(image, head, query)] : INFINITY;
      if (lane.t == 0 && query < p.queries) upstream.delta[p.query_index(image, head, query)] = delta[row];
    }
  }
};

// A block's 64 queries, as rows, and the keys that go by.
template <typename T, bool kSeparable>
struct QueryRows {
  const Problem<T>& p;
  int first;
  int64_t stride, offset;  // of the gradients and of the output
  Tile<T> q_content, q_spatial, gradient;
  KeyTiles<T, kSeparable> key_tiles;

  static constexpr int64_t bytes(int64_t height, int64_t width) {
    return 9 * Tile<T>::kBytes + (kSeparable ? line_bytes<T>(height, width) : 0);
  }

  __device__ QueryRows(const Problem<T>& p, int image, int head, int first, const Keys& keys, Shared& shared)
      : p(p),
        first(first),
        stride(int64_t(p.heads) * kWidth),
        offset((int64_t(image) * p.queries * p.heads + head) * kWidth),
        q_content(shared.tile<T>()),
        q_spatial(shared.tile<T>()),
        gradient(shared.tile<T>()),
        key_tiles(p, image, head, keys, shared) {}

  // Loads the queries and starts with the keys. Ends with a barrier.
  __device__ void begin(const Upstream<T>& upstream, int image, int head) {
    const Part<T> part;
    load_queries(q_content, Source<T>(p.q_content, image, head, part), first, p.queries, part);
    load_queries(q_spatial, Source<T>(p.q_spatial, image, head, part), first, p.queries, part);
    load_queries(gradient, Source<T>(upstream.grad + offset, stride, part), first, p.queries, part);
    load_queries(out(), Source<T>(upstream.out + offset, stride, part), first, p.queries, part);
    key_tiles.begin(p, image, head);
    end_group();
    wait_group<0>();
    barrier();
    key_tiles.finish_first();
  }

  // The output, until the second tile of keys comes.
  __device__ Tile<T> out() const { return key_tiles.values.stage(1); }

  __device__ void store(T* target, float (&sums)[4][4], const Lane& lane) const {
    scale_by(sums, p.scale / p.drop_factor);
    store_rows(target + offset, stride, sums, q_content, lane.first_row(),
               [=, this](int row) -> int64_t { return first + row < p.queries ? first + row : -1; });
  }
};

// A block has 64 queries of one head of one image, a warp 16 of them; keys go by in tiles, two in flight.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_query_kernel(Problem<T> p, Upstream<T> upstream, T* grad_content, T* grad_spatial) {
  const int first = blockIdx.x * kTile, head = blockIdx.y, image = blockIdx.z;
  const Keys keys = p.keys_of(image);
  const int tiles = keys.tiles();
  const Lane lane;
  Shared shared;
  QueryRows<T, kSeparable> rows(p, image, head, first, keys, shared);
  rows.begin(upstream, image, head);
  const Fragment<T> content(rows.q_content, lane.first_row()), conditional(rows.q_spatial, lane.first_row());
  const Fragment<T> grads(rows.gradient, lane.first_row());
  const RowSums<T> row_sums(p, upstream, rows.gradient, rows.out(), image, head, first, lane);
  KeptOfKeys kept_of(p, image, head, first, lane);
  KeyTiles<T, kSeparable>& key_tiles = rows.key_tiles;

  float by_content[4][4], by_spatial[4][4];
  clear(by_content);
  clear(by_spatial);
  for (int tile = 0; tile < tiles; ++tile) {
    wait_group<0>();
    barrier();  // this tile is there, and nobody reads the other
    if (tile + 1 < tiles) key_tiles.load((tile + 1) % 2);
    end_group();
    Kept kept = kept_of.next();
    const Visible visible(p, image, keys, tile, lane);
    kept.start_at(2 * lane.t);
    const Tile<T> k_content = key_tiles.content.stage(tile % 2), k_spatial = key_tiles.spatial.stage(tile % 2);
#pragma unroll kUnrolledGroups<T>
    for (int group = 0; group < 4; ++group) {
      float scores[2][4], grad_weights[2][4], by_score[2][4];
      clear(scores);
      clear(grad_weights);
      multiply_rows(scores, conditional, k_spatial, 16 * group);
      multiply_rows(scores, content, k_content, 16 * group);
      multiply_rows(grad_weights, grads, key_tiles.values.stage(tile % 2), 16 * group);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = i / 2 % 2, octet = 2 * group + i / 4;
        float score = scores[i / 4][i % 4];
        if (!visible.is_all && !visible.has(octet, i % 2)) score = p.hidden;
        const float weight = exp2_fast(score * p.log2_scale - row_sums.lse[row]);
        by_score[i / 4][i % 4] =
            score_gradient(weight, grad_weights[i / 4][i % 4], row_sums.delta[row], kept.has(row, octet, i % 2));
      }
      multiply_columns(by_content, by_score, k_content, 16 * group);
      multiply_columns(by_spatial, by_score, k_spatial, 16 * group);
    }
  }
  rows.store(grad_content, by_content, lane);
  rows.store(grad_spatial, by_spatial, lane);
}

}  // namespace conddetr::attn
