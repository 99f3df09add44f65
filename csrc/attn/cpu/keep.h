// Which weights dropout keeps: the bits of `keep`, in the order of a tile's keys.
#pragma once

#include "attn/cpu/shape.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

constexpr int kWord = 32;
static_assert(kTileKeys % kWord == 0);

// Bits of a block of kRows queries and a tile: bit i % 32 of words[i / 32][m] is for query m and the tile's key i.
struct Kept {
  uint32_t words[kTileKeys / kWord][kRows];
};

// The words of `count` queries from `query` on. If the tile's ordinals have no gap, they are the words of `keep`;
// otherwise they are assembled from pieces.
inline void find_kept(const Problem& p, const Keys& keys, const Tile& tile, const Task& task, int64_t query,
                      int64_t count, Kept& kept) {
  const uint32_t* words = p.keep + (task.image * p.heads + task.head) * p.keep_words * p.queries + query;
  memset(&kept, 0, sizeof kept);
  for (int r = 0; r < tile.runs;) {
    const Run& run = keys.runs[tile.first_run + r];
    // The ordinals of a rectangle's rows follow one another.
    int length = 0;
    for (; r < tile.runs && keys.runs[tile.first_run + r].ordinal == run.ordinal + length; ++r) {
      length += keys.runs[tile.first_run + r].length;
    }
    for (int done = 0; done < length;) {
      const int from = int((run.ordinal + done) % kWord), to = (run.offset + done) % kWord;
      const int room = kWord - (from > to ? from : to), bits = length - done < room ? length - done : room;
      const uint32_t chosen = ~uint32_t(0) >> (kWord - bits);
      const uint32_t* source = words + (run.ordinal + done) / kWord * p.queries;
      uint32_t* target = kept.words[(run.offset + done) / kWord];
      for (int64_t m = 0; m < count; ++m) target[m] |= (source[m] >> from & chosen) << to;
      done += bits;
    }
  }
}

// A word in every lane, of which lane i uses bit i; `>> kLanes` moves on to the next vector of keys.
template <typename Real>
CONDDETR_INLINE Integers<Real> spread(uint32_t word) {
  return Integers<Real>{} + decltype(Integers<Real>{}[0] + 0)(word);
}

// `value` where the bit of its lane is set, else zero.
template <typename Real>
CONDDETR_INLINE Vector<Real> keep(Vector<Real> value, Integers<Real> bits) {
  Integers<Real> lanes;
  for (int i = 0; i < kLanes<Real>; ++i) lanes[i] = 1 << i;
  return (bits & lanes) != 0 ? value : Vector<Real>{};
}

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
