// Attention forward on Hopper, for 16-bit numbers: ../forward.cuh with other products. Instructions and the number of
// resident blocks limit its speed. A negative scale flips the queries' sign, so the maximum needs no scale; stages of
// tiles are constants; copies start between the exponentials. Scores of the next tile start with the values of this
// one, so a warp waits once per tile; four resident blocks fill the rest. That many fit because the spatial queries
// stay in shared memory, and because dropout is a separate kernel.
#pragma once

#include "attn/cuda/forward.cuh"
#include "attn/cuda/hopper/products.cuh"

namespace conddetr::attn {

// A block holds 64 queries of one head of one image; it loops over keys in tiles, two in flight, their values one tile
// later.
template <typename T, bool kSeparable, bool kDrops>
__global__ void __launch_bounds__(kThreads, 4) hopper_forward_kernel(Problem<T> p, T* out, float* lse) {
#if defined(CONDDETR_HAS_WARPGROUPS)
  const int first = blockIdx.x * kTile, head = blockIdx.y, image = blockIdx.z;
  const Keys keys = p.keys_of(image);
  const int tiles = keys.tiles();
  const Lane lane;
  Shared shared;
  const Tile<T> q_content = shared.tile<T>(), q_spatial = shared.tile<T>();
  KeyTiles<T, kSeparable> key_tiles(p, image, head, keys, shared);

  const Part<T> part;
  load_queries(q_content, Source<T>(p.q_content, image, head, part), first, p.queries, part);
  load_queries(q_spatial, Source<T>(p.q_spatial, image, head, part), first, p.queries, part);
  key_tiles.begin(p, image, head);
  end_group();
  wait_group<0>();
  if (p.log2_scale < 0) {
    negate(q_content, part);
    negate(q_spatial, part);
  }
  barrier();
  Fragment<T> content(q_content, lane.first_row());
  key_tiles.finish_first();

  const float log2_scale = fabsf(p.log2_scale);
  KeptOfKeys kept_of(p, image, head, first, lane);
  Softmax<true> softmax;
  float sums[4][4], scores[8][4];
  clear(sums);
  const auto start_scores = [&](int stage) {
    multiply_rows_async<false>(scores, content, key_tiles.content.stage(stage));
    multiply_rows_async<true>(scores, q_spatial, key_tiles.spatial.stage(stage));
  };
  const auto attend = [&](int tile, int stage) {
    wait_group<0>();
    show_to_products();
    barrier();  // this tile's values and the next tile's keys have arrived, and no thread reads earlier ones
    const Visible visible(p, image, keys, tile, lane);
    if (!visible.is_all) visible.hide(scores, -INFINITY);
    key_tiles.copy_values(1 - stage);  // zeros past the last tile
    key_tiles.load_keys(stage);
    end_group();
    Kept kept;
    if constexpr (kDrops) kept = kept_of.next();
    softmax.update(scores, log2_scale);
    uint32_t packed[4][4];
    pack_all<T>(packed, scores);
    if constexpr (kDrops) {
      kept.start_at(2 * lane.t);
      kept.apply(packed);
    }
    softmax.shrink_sums(sums);
    begin_products(sums, packed, scores);
    multiply_columns_async<T>(sums, packed, key_tiles.values.stage(stage));
    start_scores(1 - stage);  // past the last tile, unused
    end_products();
    wait_products<0>(sums, scores);
  };
  show_to_products();
  barrier();
  begin_products(scores, content.part);
  start_scores(0);
  end_products();
  wait_products<0>(scores);
  key_tiles.load_keys(1);
  end_group();
  for (int tile = 0; tile < tiles; tile += 2) {
    attend(tile, 0);
    if (tile + 1 < tiles) attend(tile + 1, 1);
  }
  wait_group<0>();
  store_forward(out, lse, sums, softmax, p, image, head, first, q_content, lane);
#endif
}

}  // namespace conddetr::attn
