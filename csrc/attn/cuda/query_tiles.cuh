// The queries that a block loops over, tile after tile, and the step from scores to gradients.
#pragma once

#include "attn/cuda/load.cuh"
#include "attn/cuda/masks.cuh"

namespace conddetr::attn {

// Queries of one image and head, tile after tile, with their lse, delta and dropout bits for a tile of keys. Tile i is
// in stage i % 2. Past the last query everything is zero: weights are not, but all their factors are.
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

  // Starts copying a tile.
  __device__ __forceinline__ void load(int tile, int stage) {
    const int first = tile * kTile, query = first + slot;
    load_queries(content.stage(stage), q_content, first, queries, part);
    load_queries(spatial.stage(stage), q_spatial, first, queries, part);
    load_queries(gradient.stage(stage), grad, first, queries, part);
    copy_word_async((half ? delta : lse) + stage * kTile + slot, words + query, query < queries);
    if (!keep_words) return;
    copy_word_async(keep + (2 * stage + half) * kTile + slot, keep_words + query, query < queries);
  }

  // Turns scores [8 · octets, 4], from query `first` of a stage on, into weights, for a warp's rows of keys.
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

  // Zeroes dropped weights, and turns gradients of weights into those of scores; see query_rows.cuh.
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

}  // namespace conddetr::attn
