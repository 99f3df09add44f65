// Scores of a block of kRows queries and a tile of keys, in base 2, before the content product is added.
//
// With separable spatial keys the score is q_c·k_c[y, x] + q_s·R[y] + q_s·C[x]: the products with R and C are made once
// per query, so that only the content product depends on the key.
#pragma once

#include "attn/pack.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

// Where the keys of a tile lie: positions in the sequence.
void tile_positions(const Problem& p, const Keys& keys, const Tile& tile, int32_t* positions) {
  for (int r = 0; r < tile.runs; ++r) {
    const Run& run = keys.runs[tile.first_run + r];
    for (int i = 0; i < run.length; ++i) positions[run.offset + i] = int32_t(run.row * p.width) + run.column + i;
  }
}

// What scores of a block of kRows queries start from, in base 2: q_s·C[x], and q_s·R[y] less each query's reference.
// Dense keys: there is one row, and no column adds anything.
template <typename Real>
struct Start {
  Real* columns;  // [kRows][Shape::width]
  Real* rows;     // [kRows][Shape::height]
};

// Scores of a run of at most kVectors vectors. What the last one writes beyond the run, the next run writes over.
template <int kVectors, typename Real>
CONDDETR_INLINE void start_run(const Run& run, const Shape<Real>& shape, const Start<Real>& start, Real* scores) {
  constexpr int L = kLanes<Real>;
  const Real *columns = start.columns + run.column, *rows = start.rows + run.row;
  Real* target = scores + run.offset;
  for (int m = 0; m < kRows; ++m) {
    const Vector<Real> row = broadcast(*rows);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) store_vector(target + i * L, load_vector(columns + i * L) + row);
    columns += shape.width;
    rows += shape.height;
    target += kStride;
  }
}

// Scores of a block of queries and a tile of keys, before the content product is added.
template <typename Real>
void start_scores(const Problem& p, const Keys& keys, const Tile& tile, const Shape<Real>& shape,
                  const Start<Real>& start, Real* scores) {
  constexpr int L = kLanes<Real>;
  if (!p.is_separable()) {
    for (int m = 0; m < kRows; ++m) {
      const Vector<Real> row = broadcast(start.rows[m * shape.height]);
      for (int i = 0; i < tile.keys; i += L) store_vector(scores + m * kStride + i, row);
    }
  }
  for (int r = 0; p.is_separable() && r < tile.runs; ++r) {
    Run run = keys.runs[tile.first_run + r];
    for (; run.length > 4 * L; run.length -= 4 * L, run.offset += 4 * L, run.column += 4 * L) {
      start_run<4>(run, shape, start, scores);
    }
    if (run.length <= L) {
      start_run<1>(run, shape, start, scores);
    } else if (run.length <= 2 * L) {
      start_run<2>(run, shape, start, scores);
    } else if (run.length <= 3 * L) {
      start_run<3>(run, shape, start, scores);
    } else {
      start_run<4>(run, shape, start, scores);
    }
  }
  const int padded = int(round_up(tile.keys, kPanel<Real>));
  for (int m = 0; m < kRows && tile.keys < padded; ++m) {
    // Finite, so that nothing becomes NaN; as a weight it is zero, or 2^-126 times a value that is zero.
    for (int i = tile.keys; i < padded; ++i) scores[m * kStride + i] = Real(-1e30);
  }
}

// R and C as panels, used by all queries.
template <typename T>
void pack_grid(const Problem& p, int64_t image, int64_t head, Compute<T>* columns, Compute<T>* rows,
               int32_t* positions) {
  if (!p.is_separable()) return;
  for (int64_t i = 0; i < p.width || i < p.height; ++i) positions[i] = int32_t(i);
  pack_transposed(columns, p.ds, at<T>(p.columns, image, head), p.columns.item, positions, p.width, p.ds);
  pack_transposed(rows, p.ds, at<T>(p.spatial, image, head), p.spatial.item, positions, p.height, p.ds);
}

// Packs kRows queries, scaled so that scores are in base 2, and multiplies their spatial part with R and C.
template <typename T>
void pack_queries(const Problem& p, const Shape<Compute<T>>& shape, int64_t image, int64_t head, int64_t query,
                  int64_t count, const Compute<T>* columns, const Compute<T>* rows, Compute<T>* left,
                  Compute<T>* spatial_left, const Start<Compute<T>>& start) {
  using Real = Compute<T>;
  const Real factor = Real(p.scale * 1.4426950408889634);
  const T* q_content = at<T>(p.q_content, image, head) + query * p.q_content.item;
  const T* q_spatial = at<T>(p.q_spatial, image, head) + query * p.q_spatial.item;
  pack_left(left, q_content, p.q_content.item, count, 0, p.d, factor);
  fill(start.rows, size_t(kRows * shape.height) * sizeof(Real));
  if (!p.is_separable()) {
    pack_left(left, q_spatial, p.q_spatial.item, count, p.d, p.ds, factor);
    return;
  }
  pack_left(spatial_left, q_spatial, p.q_spatial.item, count, 0, p.ds, factor);
  fill(start.columns, size_t(kRows * shape.width) * sizeof(Real));
  multiply(spatial_left, columns, p.ds, p.width, start.columns, kPanel<Real>, shape.width);
  multiply(spatial_left, rows, p.ds, p.height, start.rows, kPanel<Real>, shape.height);
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
