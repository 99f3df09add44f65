// Attention forward on Hopper, for 16-bit numbers: what forward.cuh does, with other products. Instructions are what
// binds there, so they are saved: a negative scale turns the queries' sign, and the maximum then needs no scale; stages
// of tiles are constants. Scores of the next tile are on their way while weights of this one are made, and copies are
// started between the exponentials.
#pragma once

#include "attn/forward.cuh"
#include "attn/hopper.cuh"

namespace conddetr::attn {

// A block has 64 queries of one head of one image; keys go by in tiles, two in flight, their values one tile later.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kThreads, 3) hopper_forward_kernel(Problem<T> p, T* out, float* lse) {
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
  barrier();
  Fragment<T> content(q_content, lane.first_row()), conditional(q_spatial, lane.first_row());
  const uint32_t sign = p.log2_scale < 0 ? 0x80008000u : 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) content.part[i / 4][i % 4] ^= sign, conditional.part[i / 4][i % 4] ^= sign;
  key_tiles.finish_first();

  const float log2_scale = fabsf(p.log2_scale);
  KeptOfKeys kept_of(p, image, head, first, lane);
  Softmax<true> softmax;
  float sums[4][4];
  clear(sums);
  float even[8][4], odd[8][4];
  const auto start_scores = [&](float (&scores)[8][4], int stage) {
    begin_products(scores, content.part, conditional.part);
    multiply_rows_async<false>(scores, content, key_tiles.content.stage(stage));
    multiply_rows_async<true>(scores, conditional, key_tiles.spatial.stage(stage));
    end_products();
  };
  const auto attend = [&](int tile, int stage, float (&weights)[8][4], float (&next_scores)[8][4]) {
    wait_group<0>();
    show_to_products();
    barrier();  // this tile's values and the next tile's keys are there, and nobody reads what came before
    start_scores(next_scores, 1 - stage);  // past the last tile, of whatever is there
    Kept kept = kept_of.next();
    const Visible visible(p, image, keys, tile, lane);
    if (!visible.is_all) visible.hide(weights, -INFINITY);
    key_tiles.copy_values(1 - stage);  // past the last tile zeros
    key_tiles.load_keys(stage);
    end_group();
    softmax.update(weights, log2_scale);
    uint32_t packed[4][4];
    pack_all<T>(packed, weights);
    if (p.keep) {
      kept.start_at(2 * lane.t);
      kept.apply(packed);
    }
    softmax.shrink_sums(sums);
    begin_products(sums, packed);
    multiply_columns_async<T>(sums, packed, key_tiles.values.stage(stage));
    end_products();
    wait_products<0>(sums, next_scores);
  };
  show_to_products();
  barrier();
  start_scores(even, 0);
  wait_products<0>(even);
  key_tiles.load_keys(1);
  end_group();
  for (int tile = 0; tile < tiles; tile += 2) {
    attend(tile, 0, even, odd);
    if (tile + 1 < tiles) attend(tile + 1, 1, odd, even);
  }
  wait_group<0>();
  store_forward(out, lse, sums, softmax, p, image, head, first, q_content, lane);
#endif
}

}  // namespace conddetr::attn
