// Which weights dropout keeps.
#pragma once

#include "attn/shape.h"

#include "common/philox_simd.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

// Which weights survive, for the keys of one tile.
template <typename Real>
struct Dropout {
  explicit Dropout(const Problem& p)
      : threshold(philox::threshold(float(p.dropout_p))), factor(Real(1 / (1 - p.dropout_p))) {}
  uint32_t threshold;
  Real factor;

  // kept[i] = factor or 0 for the keys of a tile, of one query.
  void fill(const Problem& p, const Keys& keys, const Tile& tile, int64_t query_index, Real* kept) const {
    uint32_t numbers[kTileKeys + 8 + 4 * kCounters];
    for (int r = 0; r < tile.runs;) {
      const Run& run = keys.runs[tile.first_run + r];
      // Rows of a rectangle follow one another: their numbers are drawn together.
      int64_t length = 0;
      for (; r < tile.runs && keys.runs[tile.first_run + r].ordinal == run.ordinal + length; ++r) {
        length += keys.runs[tile.first_run + r].length;
      }
      const int64_t skipped = run.ordinal % 4, groups = (skipped + length + 3) / 4;
      const uint64_t counter = philox::counter(query_index, p.keys, run.ordinal);
      for (int64_t g = 0; g < groups; g += kCounters) random_numbers(p.seed, counter + uint64_t(g), numbers + 4 * g);
      for (int64_t i = 0; i < length; ++i) {
        kept[run.offset + i] = (numbers[skipped + i] >> 8) >= threshold ? factor : Real(0);
      }
    }
  }
};

int64_t query_index(const Problem& p, int64_t image, int64_t head, int64_t query) {
  return (image * p.heads + head) * p.queries + query;
}

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
