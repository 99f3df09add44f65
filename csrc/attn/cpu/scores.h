// Scores of a block of kRows queries and a tile of keys, in base 2.
//
// With separable spatial keys the score is q_c·k_c[y, x] + q_s·R[y] + q_s·C[x]: the products with R and C are made once
// per query, so that only the content product depends on the key.
#pragma once

#include "attn/cpu/pack.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

// Where the keys of a tile lie: positions in the sequence.
void tile_positions(const Problem& p, const Keys& keys, const Tile& tile, int32_t* positions) {
  for (int r = 0; r < tile.runs; ++r) {
    const Run& run = keys.runs[tile.first_run + r];
    for (int i = 0; i < run.length; ++i) positions[run.offset + i] = int32_t(run.row * p.width) + run.column + i;
  }
}

// Of one vector of a tile, the keys that are neighbours in a row of the grid, or that are not there.
template <typename Real>
struct Piece {
  Integers<Real> lanes;  // all bits of each of them, no bit of the others
  int32_t column, row;   // of what they start from, see Shape::start; `column` is that of lane 0
};

template <typename Real>
struct Pieces {
  static constexpr int L = kLanes<Real>;

  // For the keys of one tile.
  void find(const Problem& p, const Shape<Real>& shape, const Keys& keys, const Tile& tile) {
    count = 0;
    first_row = int(shape.rows);
    if (p.is_separable()) {
      for (int r = 0; r < tile.runs; ++r) {
        const Run& run = keys.runs[tile.first_run + r];
        for (int i = 0; i < run.length;) i += add(run.offset + i, run.length - i, run.column + i, run.row);
      }
    } else {
      for (int i = 0; i < tile.keys;) i += add(i, tile.keys - i, 0, 0);
    }
    const int padded = int(round_up(tile.keys, kPanel<Real>)), row = list[count - 1].row - first_row;
    for (int i = tile.keys; i < padded;) i += add(i, padded - i, i % L - L, row);
    first[padded / L] = count;
  }

  // As many of `length` keys as are in the vector that key `offset` is in.
  int add(int offset, int length, int column, int row) {
    const int lane = offset % L, end = lane + length < L ? lane + length : L;
    if (lane == 0) first[offset / L] = count;
    Piece<Real>& piece = list[count++];
    for (int i = 0; i < L; ++i) piece.lanes[i] = i >= lane && i < end ? -1 : 0;
    piece.column = L + column - lane;
    piece.row = first_row + row;
    return end - lane;
  }

  Piece<Real> list[kTileKeys];
  int32_t first[kTileKeys / L + 1];  // [v]: of vector v
  int32_t count, first_row;
};

// Scores of kRows queries and a panel of keys, whose first vector is `vector`: start + A B, see `product`.
template <typename Real>
__attribute__((noinline)) void score(int64_t depth, const Real* a, const Real* b, const Pieces<Real>& pieces,
                                     int vector, const Shape<Real>& shape, const Real* start, Real* scores) {
  constexpr int L = kLanes<Real>;
  Vector<Real> sums[kRows][2];
  sum_products<kDepth, 1>(depth, a, b, sums);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    for (int i = pieces.first[vector + half]; i < pieces.first[vector + half + 1]; ++i) {
      const Piece<Real>& piece = pieces.list[i];
      const Real *column = start + piece.column, *row = start + piece.row;
#pragma GCC unroll 12
      for (int m = 0; m < kRows; ++m) {
        const Vector<Real> value = load_vector(column + m * shape.start) + row[m * shape.start];
        sums[m][half] += (Vector<Real>)((Integers<Real>)value & piece.lanes);
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    store_vector(scores + m * kStride, sums[m][0]);
    store_vector(scores + m * kStride + L, sums[m][1]);
  }
}

// Scores of a block of queries and a tile of keys.
template <typename Real>
CONDDETR_INLINE void make_scores(const Tile& tile, const Pieces<Real>& pieces, const Shape<Real>& shape,
                                 const Real* start, const Real* left, const Real* keys, Real* scores) {
  const int64_t first = shape.depth < kDepth ? shape.depth : kDepth;
  for (int key = 0; key < tile.keys; key += kPanel<Real>) {
    const Real* panel = keys + key * shape.depth;
    score(first, left, panel, pieces, key / kLanes<Real>, shape, start, scores + key);
    for (int64_t k = kDepth; k < shape.depth; k += kDepth) {
      const int64_t count = shape.depth - k < kDepth ? shape.depth - k : kDepth;
      product<kDepth, 1>(count, left + k * kRows, panel + k * kPanel<Real>, scores + key, kStride);
    }
  }
}

// C and R as panels, one behind the other, used by all queries. `grid` has room for them before they are packed, too.
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
    // Finite, so that nothing becomes NaN; as a weight it is zero, or 2^-126 times a value that is zero.
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
