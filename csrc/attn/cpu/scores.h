// Scores of a block of kRows queries and a tile of keys, in base 2.
//
// With separable spatial keys the score is q_c·k_c[y, x] + q_s·R[y] + q_s·C[x]: the products with R and C are
// computed once per query (operands.h), so only the content product depends on the key.
#pragma once

#include "attn/cpu/pieces.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

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

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
