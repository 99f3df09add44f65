// Packed operands of backward: all queries of one head, and one tile of keys after the other.
#pragma once

#include <math.h>

#include "attn/cpu/operands.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

// Log-sum-exps between -kModerate and kModerate are moderate: no power of two is too large or too small then.
constexpr int kModerate = 24;

// `padded` queries: whole blocks of kBlockQueries.
template <typename T>
struct BackwardOperands {
  using Real = Compute<T>;

  BackwardOperands(const Problem& p_, const Upstream& u_, const Task& task_, const Shape<Real>& shape_, int64_t padded_)
      : p(p_), u(u_), task(task_), shape(shape_), padded(padded_), blocks(padded_ / kRows) {}

  void lay_out(Arena& memory) {
    left = memory.take<Real>(blocks * left_size(shape.depth));
    upstream_left = memory.take<Real>(blocks * left_size(p.dv));
    queries = memory.take<Real>(padded * shape.content);
    upstream = memory.take<Real>(padded * shape.values);
    scaled = memory.take<Real>(padded * p.dv);
    delta = memory.take<Real>(padded);
    starts = memory.take<Real>(blocks * kRows * shape.start);
    grid = memory.take<Real>(grid_size<Real>(p));
    spatial_left = memory.take<Real>(left_size(p.ds));
    keys_transposed = memory.take<Real>(kTileKeys * shape.depth);
    values_transposed = memory.take<Real>(kTileKeys * p.dv);
    keys = memory.take<Real>(kTileKeys * shape.content);
    positions = memory.take<int32_t>(kTileKeys + p.width + p.height + padded);
  }

  Real* start(int64_t block) const { return starts + block * kRows * shape.start; }
  int64_t count(int64_t block) const {
    const int64_t left_over = p.queries - block * kRows;
    return left_over < 0 ? 0 : (left_over < kRows ? left_over : kRows);
  }
  const T* row_of(const void* tensor, int64_t query) const {
    return static_cast<const T*>(tensor) + ((task.image * p.queries + query) * p.heads + task.head) * p.dv;
  }

  void pack_head() {
    pack_grid<T>(p, task.image, task.head, grid, positions);
    fill(queries, size_t(padded * shape.content) * sizeof(Real));
    fill(upstream, size_t(padded * shape.values) * sizeof(Real));
    fill(keys, size_t(kTileKeys * shape.content) * sizeof(Real));
    for (int64_t i = 0; i < p.queries; ++i) positions[i] = int32_t(i);
    const T* q_content = at<T>(p.q_content, task.image, task.head);
    const T* q_spatial = at<T>(p.q_spatial, task.image, task.head);
    pack_straight(queries, padded, q_content, p.q_content.item, positions, p.queries, 0, p.d, Real(p.scale));
    if (!p.is_separable()) {
      pack_straight(queries, padded, q_spatial, p.q_spatial.item, positions, p.queries, p.d, p.ds, Real(p.scale));
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t query = block * kRows;
      pack_queries<T>(p, shape, task.image, task.head, query, count(block), grid, left + block * left_size(shape.depth),
                      spatial_left, start(block));
      for (int64_t m = 0; m < kRows; ++m) pack_row(block, m);
      pack_left(upstream_left + block * left_size(p.dv), scaled + query * p.dv, p.dv, count(block), 0, p.dv, Real(1));
    }
    pack_straight(upstream, padded, scaled, p.dv, positions, p.queries, 0, p.dv, Real(1));
  }

  // A query's weight is 2^(score - shift) · factor, with factor = 2^(shift - lse). Moderate scores have no shift, so
  // they are rounded once less, and as small numbers. The factor multiplies dO, and so delta = dO·O; dropout's factor
  // multiplies dO only.
  void pack_row(int64_t block, int64_t m) {
    const int64_t query = block * kRows + m;
    Real factor = 0, total = 0;
    if (m < count(block)) {
      const Real lse = static_cast<const Real*>(u.lse)[query_index(p, task.image, task.head, query)];
      const bool is_seen = lse != Real(INFINITY);  // it has a visible key
      const Real shift = !is_seen || (lse > -kModerate && lse < kModerate) ? Real(0) : ::round(lse);
      if (is_seen) factor = ::exp2(shift - lse);
      Real* rows = start(block) + m * shape.start + shape.rows;
      for (int64_t y = 0; shift != 0 && y < p.height; ++y) rows[y] -= shift;
      scale(scaled + query * p.dv, row_of(u.grad, query), p.dv, factor * Real(1 / (1 - p.dropout_p)));
      total = dot(row_of(u.grad, query), row_of(u.out, query), p.dv) * factor;
    }
    delta[query] = total;
  }

  void pack_tile(const Keys& visited, const Tile& tile) {
    const int64_t n = tile.keys;
    tile_positions(p, visited, tile, positions);
    pack_keys<T>(p, shape, task.image, task.head, tile, positions, keys_transposed);
    pack_transposed(values_transposed, p.dv, at<T>(p.v, task.image, task.head), p.v.item, positions, n, p.dv);
    pack_straight(keys, kTileKeys, at<T>(p.k_content, task.image, task.head), p.k_content.item, positions, n, 0, p.d,
                  Real(1));
    if (!p.is_separable()) {
      pack_straight(keys, kTileKeys, at<T>(p.spatial, task.image, task.head), p.spatial.item, positions, n, p.d, p.ds,
                    Real(1));
    }
  }

  const Problem& p;
  const Upstream& u;
  const Task& task;
  const Shape<Real>& shape;
  const int64_t padded, blocks;
  Real *left, *upstream_left, *queries, *upstream, *scaled, *delta, *starts, *grid, *spatial_left;
  Real *keys_transposed, *values_transposed, *keys;
  int32_t* positions;  // of the last tile's keys
};

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
