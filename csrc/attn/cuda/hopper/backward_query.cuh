// Gradients of both queries on Hopper, for 16-bit numbers: ../backward_query.cuh with other products.
#pragma once

#include "attn/cuda/hopper/products.cuh"
#include "attn/cuda/query_rows.cuh"

namespace conddetr::attn {

// A block holds 64 queries of one head of one image; it loops over keys in tiles, two in flight.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kThreads, 3)
    hopper_backward_query_kernel(Problem<T> p, Upstream<T> upstream, T* grad_content, T* grad_spatial) {
#if defined(CONDDETR_HAS_WARPGROUPS)
  const int first = blockIdx.x * kTile, head = blockIdx.y, image = blockIdx.z;
  const Keys keys = p.keys_of(image);
  const int tiles = keys.tiles();
  const Lane lane;
  Shared shared;
  QueryRows<T, kSeparable> rows(p, image, head, first, keys, shared);
  rows.begin(upstream, image, head);
  Fragment<T> content(rows.q_content, lane.first_row()), conditional(rows.q_spatial, lane.first_row());
  Fragment<T> grads(rows.gradient, lane.first_row());
  const RowSums<T> row_sums(p, upstream, rows.gradient, rows.out(), image, head, first, lane);
  KeptOfKeys kept_of(p, image, head, first, lane);
  KeyTiles<T, kSeparable>& key_tiles = rows.key_tiles;

  float by_content[4][4], by_spatial[4][4];
  clear(by_content);
  clear(by_spatial);
  const auto attend = [&](int tile, int stage) {
    wait_group<0>();
    show_to_products();
    barrier();  // this tile has arrived, and no thread reads the other
    float scores[8][4], grad_weights[8][4];
    begin_products(scores, grad_weights, content.part, conditional.part, grads.part);
    multiply_rows_async<false>(scores, content, key_tiles.content.stage(stage));
    multiply_rows_async<true>(scores, conditional, key_tiles.spatial.stage(stage));
    end_products();
    multiply_rows_async<false>(grad_weights, grads, key_tiles.values.stage(stage));
    end_products();
    Kept kept = kept_of.next();
    wait_products<1>(scores);

    const Visible visible(p, image, keys, tile, lane);
    if (!visible.is_all) visible.hide(scores, p.hidden);
    key_tiles.load(1 - stage);  // zeros past the last tile
    end_group();
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      scores[i / 4][i % 4] = exp2_fast(scores[i / 4][i % 4] * p.log2_scale - row_sums.lse[i / 2 % 2]);
    }
    wait_products<0>(grad_weights);
    kept.start_at(2 * lane.t);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float& value = scores[i / 4][i % 4];
      value = score_gradient(value, grad_weights[i / 4][i % 4], row_sums.delta[i / 2 % 2],
                             kept.has(i / 2 % 2, i / 4, i % 2));
    }
    uint32_t packed[4][4];
    pack_all<T>(packed, scores);
    begin_products(by_content, by_spatial, packed);
    multiply_columns_async<T>(by_content, packed, key_tiles.content.stage(stage));
    multiply_columns_async<T>(by_spatial, packed, key_tiles.spatial.stage(stage));
    end_products();
    wait_products<0>(by_content, by_spatial);
  };
  for (int tile = 0; tile < tiles; tile += 2) {
    attend(tile, 0);
    if (tile + 1 < tiles) attend(tile + 1, 1);
  }
  wait_group<0>();
  rows.store(grad_content, by_content, lane);
  rows.store(grad_spatial, by_spatial, lane);
#endif
}

}  // namespace conddetr::attn
