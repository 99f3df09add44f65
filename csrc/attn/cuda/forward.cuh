// Attention forward, on any GPU.
#pragma once

#include "attn/cuda/key_tiles.cuh"
#include "attn/cuda/masks.cuh"
#include "attn/cuda/products.cuh"
#include "attn/cuda/softmax.cuh"

namespace conddetr::attn {

// Writes the output and lse of a warp's queries, through a free tile.
template <typename T, typename AnySoftmax>
__device__ __forceinline__ void store_forward(T* out, float* lse, float (&sums)[4][4], const AnySoftmax& softmax,
                                              const Problem<T>& p, int image, int head, int first, Tile<T> tile,
                                              const Lane& lane) {
  const float totals[2] = {softmax.sum(0), softmax.sum(1)};
  const float factors[2] = {inverse_total(totals[0] * p.drop_factor), inverse_total(totals[1] * p.drop_factor)};
#pragma unroll
  for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] *= factors[i / 2 % 2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int query = first + lane.first_row() + lane.g + 8 * row;
    if (lane.t == 0 && query < p.queries) {
      lse[p.query_index(image, head, query)] = log_sum_exp2(softmax.highest[row], totals[row]);
    }
  }
  const int64_t stride = int64_t(p.heads) * kWidth;
  store_rows(out + int64_t(image) * p.queries * stride + head * kWidth, stride, sums, tile, lane.first_row(),
             [=](int row) -> int64_t { return first + row < p.queries ? first + row : -1; });
}

template <typename T, bool kSeparable>
constexpr int64_t forward_bytes(int64_t height, int64_t width) {
  return 8 * Tile<T>::kBytes + (kSeparable ? line_bytes<T>(height, width) : 0);
}

// A block holds 64 queries of one head of one image, a warp 16 of them; it loops over keys in tiles, two in flight.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) forward_kernel(Problem<T> p, T* out, float* lse) {
  // Octets of scores per step. Float32 reads queries again for each step; 16-bit queries fill all registers.
  constexpr int kAtOnce = sizeof(T) == 2 ? 2 : 8;
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
  const Fragment<T> content(q_content, lane.first_row()), conditional(q_spatial, lane.first_row());
  key_tiles.finish_first();

  Softmax<> softmax;
  float sums[4][4];
  clear(sums);
  KeptOfKeys kept_of(p, image, head, first, lane);
  for (int tile = 0; tile < tiles; ++tile) {
    wait_group<0>();
    barrier();  // this tile has arrived, and no thread reads the other
    if (tile + 1 < tiles) key_tiles.load((tile + 1) % 2);
    end_group();
    float weights[8][4];
    clear(weights);
#pragma unroll
    for (int octet = 0; octet < 8; octet += kAtOnce) {
      auto& scores = reinterpret_cast<float (&)[kAtOnce][4]>(weights[octet]);
      multiply_rows(scores, conditional, key_tiles.spatial.stage(tile % 2), 8 * octet);
      multiply_rows(scores, content, key_tiles.content.stage(tile % 2), 8 * octet);
    }
    Kept kept = kept_of.next();
    const Visible visible(p, image, keys, tile, lane);
    if (!visible.is_all) visible.hide(weights, p.hidden);
    softmax.update(weights, p.log2_scale);
    if (p.keep) {
      kept.start_at(2 * lane.t);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (!kept.has(i / 2 % 2, i / 4, i % 2)) weights[i / 4][i % 4] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] *= softmax.shrink[i / 2 % 2];
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      float left[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) left[i / 4][i % 4] = weights[2 * group + i / 4][i % 4];
      multiply_columns(sums, left, key_tiles.values.stage(tile % 2), 16 * group);
    }
  }
  store_forward(out, lse, sums, softmax, p, image, head, first, q_content, lane);
}

}  // namespace conddetr::attn
