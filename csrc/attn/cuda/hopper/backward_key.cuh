// Gradients of keys and values on Hopper, for 16-bit numbers: ../backward_key.cuh with other products.
#pragma once

#include "attn/cuda/hopper/products.cuh"
#include "attn/cuda/key_rows.cuh"

namespace conddetr::attn {

// A block holds one tile of keys of one head of one image, as rows; it loops over queries, as columns, in tiles, two in
// flight.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kThreads, 2)
    hopper_backward_key_kernel(Problem<T> p, Upstream<T> upstream, T* grad_content, T* grad_spatial, T* grad_v) {
#if defined(CONDDETR_HAS_WARPGROUPS)
  const Lane lane;
  Shared shared;
  KeyRows<T, kSeparable> rows(p, upstream, blockIdx.z, blockIdx.y, blockIdx.x, shared);
  rows.begin();
  Fragment<T> content(rows.content, lane.first_row()), conditional(rows.spatial, lane.first_row());
  Fragment<T> value(rows.values, lane.first_row());
  QueryTiles<T>& queries = rows.queries;
  float by_content[4][4], by_spatial[4][4], by_value[4][4];
  uint32_t kept_weights[4][4], by_score[4][4];
  clear(by_content);
  clear(by_spatial);
  clear(by_value);

  const auto attend = [&](int block, int stage) {
    wait_group<0>();
    wait_products<0>(by_content, by_spatial, by_value, kept_weights, by_score);
    show_to_products();
    barrier();  // this tile has arrived, and no thread reads the other
    const Tile<T> q_content = queries.content.stage(stage), q_spatial = queries.spatial.stage(stage);
    const Tile<T> gradient = queries.gradient.stage(stage);
    float weights[8][4], grads[8][4];
    begin_products(weights, grads, content.part, conditional.part, value.part);
    multiply_rows_async<false>(weights, content, q_content);
    multiply_rows_async<true>(weights, conditional, q_spatial);
    end_products();
    multiply_rows_async<false>(grads, value, gradient);
    end_products();
    if (block + 1 < rows.blocks) queries.load(block + 1, 1 - stage);
    end_group();
    wait_products<1>(weights);
    queries.weigh(weights, stage, 0, lane);
    wait_products<0>(grads);
    queries.differentiate(weights, grads, stage, 0, lane);
    pack_all<T>(kept_weights, weights);
    pack_all<T>(by_score, grads);
    begin_products(by_content, by_spatial, by_value, kept_weights, by_score);
    multiply_columns_async<T>(by_value, kept_weights, gradient);
    multiply_columns_async<T>(by_content, by_score, q_content);
    multiply_columns_async<T>(by_spatial, by_score, q_spatial);
    end_products();
  };
  for (int block = 0; block < rows.blocks; block += 2) {
    attend(block, 0);
    if (block + 1 < rows.blocks) attend(block + 1, 1);
  }
  wait_products<0>(by_content, by_spatial, by_value, kept_weights, by_score);
  rows.store(grad_content, by_content, p.scale / p.drop_factor, lane);
  rows.store(grad_spatial, by_spatial, p.scale / p.drop_factor, lane);
  rows.store(grad_v, by_value, 1 / p.drop_factor, lane);
#endif
}

}  // namespace conddetr::attn
