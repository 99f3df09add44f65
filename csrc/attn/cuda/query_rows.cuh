// A block's queries in backward, and the gradient of a score.
#pragma once

#include "attn/cuda/key_tiles.cuh"
#include "attn/cuda/masks.cuh"

namespace conddetr::attn {

// A score's gradient is weight · (grad_weight - delta), times the scale. With dropout the weight's gradient counts only
// if the weight was kept, times 1 / (1 - p): that factor and the scale come last, and delta is without the factor.
__device__ __forceinline__ float score_gradient(float weight, float grad_weight, float delta, bool is_kept) {
  const float without = -weight * delta;
  return is_kept ? weight * grad_weight + without : without;
}

// lse and delta of a warp's queries, of rows g and g + 8. delta is computed from tiles of the output and its gradient,
// and stored for the gradients of keys. Rows past the last query have zero weights.
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

// A block's 64 queries, as rows, and the keys that it loops over.
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

  // Loads the queries and the first keys, waits at a barrier, and builds the first spatial keys.
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

  // The output, until the second tile of keys overwrites it.
  __device__ Tile<T> out() const { return key_tiles.values.stage(1); }

  __device__ void store(T* target, float (&sums)[4][4], const Lane& lane) const {
    scale_by(sums, p.scale / p.drop_factor);
    store_rows(target + offset, stride, sums, q_content, lane.first_row(),
               [=, this](int row) -> int64_t { return first + row < p.queries ? first + row : -1; });
  }
};

}  // namespace conddetr::attn
