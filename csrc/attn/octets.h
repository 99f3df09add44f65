// How the CUDA kernels walk over keys, and which weights dropout keeps.
//
// An octet is eight neighbours in one row of the image's grid of keys, starting at a multiple of 8. Octets are counted
// down the columns of the valid rectangle: for eight columns of keys the column part of a score stays in registers while
// the rows go by. A tile is eight octets, whatever columns they are in: a width is padded to a multiple of 8 and the
// whole rectangle to a multiple of 64 keys, no more. Dense keys are a grid of one row.
#pragma once

#include "common/philox.h"
#include "common/rectangle.h"

namespace conddetr::attn {

constexpr int kOctet = 8;
constexpr int kTileOctets = 8;

struct Key {
  int y, x;
  bool is_inside;  // the valid rectangle
};

struct Octets {
  Rectangle valid;

  CONDDETR_BOTH int columns() const { return (valid.width + kOctet - 1) / kOctet; }
  CONDDETR_BOTH int count() const { return valid.height * columns(); }
  CONDDETR_BOTH int tiles() const { return (count() + kTileOctets - 1) / kTileOctets; }

  CONDDETR_BOTH Key key(int tile, int slot) const {
    const int octet = tile * kTileOctets + slot / kOctet;
    if (octet >= count()) return {0, 0, false};
    const int column = octet / valid.height;
    const int x = column * kOctet + slot % kOctet;
    return {octet - column * valid.height, x, x < valid.width};
  }
};

// Octets one after the other, without a division for each.
struct Walk {
  int height, columns, y, column;

  CONDDETR_BOTH explicit Walk(const Octets& octets)
      : height(octets.valid.height), columns(octets.columns()), y(0), column(0) {}

  // Steps to the next octet; true if it is in other columns. Past the last octet it stays in the last columns.
  CONDDETR_BOTH bool next() {
    if (++y < height) return false;
    y = 0;
    if (column + 1 >= columns) return false;
    ++column;
    return true;
  }
};

// Bit i: whether dropout keeps the weight of ordinal 4 · group + i; see philox.h.
CONDDETR_BOTH uint32_t keep_four(uint64_t seed, uint64_t counter, uint32_t threshold) {
  const philox::Four random = philox::randint4x(seed, counter);
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= uint32_t((random.lane[i] >> 8) >= threshold) << i;
  return bits;
}

// Bit i: whether dropout keeps the weight of key `ordinal` + i, for eight keys.
CONDDETR_BOTH uint32_t keep_octet(uint64_t seed, int64_t query_index, int64_t keys, int64_t ordinal,
                                  uint32_t threshold) {
  const uint64_t counter = philox::counter(query_index, keys, ordinal);
  const int skipped = int(ordinal % 4);
  uint32_t bits = keep_four(seed, counter, threshold) | keep_four(seed, counter + 1, threshold) << 4;
  if (skipped) bits |= keep_four(seed, counter + 2, threshold) << 8;
  return bits >> skipped & 0xFFu;
}

}  // namespace conddetr::attn
