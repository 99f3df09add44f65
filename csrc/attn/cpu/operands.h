// Packed operands of scores: the grid, a block of queries, a tile of keys.
#pragma once

#include "attn/cpu/pack.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

// Positions of a tile's keys in the sequence.
void tile_positions(const Problem& p, const Keys& keys, const Tile& tile, int32_t* positions) {
  for (int r = 0; r < tile.runs; ++r) {
    const Run& run = keys.runs[tile.first_run + r];
    for (int i = 0; i < run.length; ++i) positions[run.offset + i] = int32_t(run.row * p.width) + run.column + i;
  }
}

// C and R as panels, one behind the other, used by all queries. `grid` also has room for their unpacked copy.
template <typename T>
void pack_grid(const Problem& p, int64_t image, int64_t head, Compute<T>* grid, int32_t* positions) {
  using Real = Compute<T>;
  if (!p.is_separable()) return;
  const int64_t count = p.width + p.height;
  Real* copy = grid + round_up(count, kPanel<Real>) * p.ds;
  for (int64_t i = 0; i < count; ++i) {
    positions[i] = int32_t(i);
    const T* from = i < p.width ? at<T>(p.columns, image, head) + i * p.columns.item
                                : at<T>(p.spatial, image, head) + (i - p.width) * p.spatial.item;
    scale(copy + i * p.ds, from, p.ds, Real(1));
  }
  pack_transposed(grid, p.ds, copy, p.ds, positions, count, p.ds);
}

template <typename Real>
int64_t grid_size(const Problem& p) {
  return p.is_separable() ? 2 * round_up(p.width + p.height, kPanel<Real>) * p.ds : 0;
}

// Packs kRows queries, scaled so that scores are in base 2, and multiplies their spatial part with C and R.
template <typename T>
void pack_queries(const Problem& p, const Shape<Compute<T>>& shape, int64_t image, int64_t head, int64_t query,
                  int64_t count, const Compute<T>* grid, Compute<T>* left, Compute<T>* spatial_left,
                  Compute<T>* start) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  const Real factor = Real(p.scale * 1.4426950408889634);
  const T* q_content = at<T>(p.q_content, image, head) + query * p.q_content.item;
  const T* q_spatial = at<T>(p.q_spatial, image, head) + query * p.q_spatial.item;
  pack_left(left, q_content, p.q_content.item, count, 0, p.d, factor);
  for (int m = 0; m < kRows; ++m) {
    // Finite, so that nothing becomes NaN; its weight is zero, or 2^-126 times a value that is zero.
    store_vector(start + m * shape.start, broadcast(Real(-1e30)));
  }
  if (p.is_separable()) {
    pack_left(spatial_left, q_spatial, p.q_spatial.item, count, 0, p.ds, factor);
    multiply<false>(spatial_left, grid, p.ds, p.width + p.height, start + L, kPanel<Real>, shape.start);
  } else {
    pack_left(left, q_spatial, p.q_spatial.item, count, p.d, p.ds, factor);
    for (int m = 0; m < kRows; ++m) fill(start + m * shape.start + L, size_t(L + 1) * sizeof(Real));
  }
}

template <typename T>
void pack_keys(const Problem& p, const Shape<Compute<T>>& shape, int64_t image, int64_t head, const Tile& tile,
               const int32_t* positions, Compute<T>* keys) {
  using Real = Compute<T>;
  pack_transposed(keys, shape.depth, at<T>(p.k_content, image, head), p.k_content.item, positions, tile.keys, p.d);
  if (!p.is_separable()) {
    pack_transposed(keys + p.d * kPanel<Real>, shape.depth, at<T>(p.spatial, image, head), p.spatial.item, positions,
                    tile.keys, p.ds);
  }
}

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
