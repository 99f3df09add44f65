// Keys of a tile that are neighbours in a row of the grid: their scores start from the same row and from neighbouring
// columns.
#pragma once

#include "attn/cpu/shape.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

// Keys of one vector of a tile that are neighbours in a row of the grid, or that lie past the last key.
template <typename Real>
struct Piece {
  Integers<Real> lanes;  // all bits set for these keys, none for the others
  int32_t column, row;   // where their scores start, see Shape::start; `column` is that of lane 0
};

template <typename Real>
struct Pieces {
  static constexpr int L = kLanes<Real>;

  // Finds the pieces of one tile.
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

  // Adds those of `length` keys that are in the vector of key `offset`; returns their number.
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
  int32_t first[kTileKeys / L + 1];  // [v]: first piece of vector v
  int32_t count, first_row;
};

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
