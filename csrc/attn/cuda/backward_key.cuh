// Gradients of keys and values, on any GPU.
#pragma once

#include "attn/cuda/key_rows.cuh"
#include "attn/cuda/products.cuh"

namespace conddetr::attn {

// Gradients of content keys, spatial keys (as dense keys, also if they are separable) and values, contiguous [batch,
// keys, heads, 32]. A block holds one tile of keys, a warp 16 of them as rows; it loops over queries, as columns, in
// tiles, two in flight.
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
    barrier();  // this tile has arrived, and no thread reads the other
    const int stage = block % 2;
    if (block + 1 < rows.blocks) queries.load(block + 1, 1 - stage);
    end_group();
    const Tile<T> q_content = queries.content.stage(stage), q_spatial = queries.spatial.stage(stage);
    const Tile<T> gradient = queries.gradient.stage(stage);
#pragma unroll(kUnrolledGroups<T>)
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
