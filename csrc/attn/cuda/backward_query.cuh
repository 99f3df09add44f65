// Gradients of both queries, on any GPU, and delta.
#pragma once

#include "attn/cuda/products.cuh"
#include "attn/cuda/query_rows.cuh"

namespace conddetr::attn {

// A block holds 64 queries of one head of one image, a warp 16 of them; it loops over keys in tiles, two in flight.
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
    barrier();  // this tile has arrived, and no thread reads the other
    if (tile + 1 < tiles) key_tiles.load((tile + 1) % 2);
    end_group();
    Kept kept = kept_of.next();
    const Visible visible(p, image, keys, tile, lane);
    kept.start_at(2 * lane.t);
    const Tile<T> k_content = key_tiles.content.stage(tile % 2), k_spatial = key_tiles.spatial.stage(tile % 2);
#pragma unroll(kUnrolledGroups<T>)
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
