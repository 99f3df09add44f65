// Conditional attention on the CPU: the interface of `cpu.cpp` to the code that is compiled once for each instruction
// set.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/levels.h"
#include "common/scratch.h"
#include "common/stored.h"

namespace conddetr::attn {

// Keys are visited in tiles of at most this many: a multiple of the rows and panels of every instruction set, and with
// heads of 32 channels one tile of keys, values and scores fits the first-level cache.
constexpr int kTileKeys = 96;
// Queries whose scores backward keeps at a time.
constexpr int kBlockQueries = 48;

// [batch, items, heads, channels], strides in numbers; channels are contiguous.
struct Tensor4 {
  const void* data;
  int64_t image, item, head;
};

// Visible keys that are neighbours in a row of the grid, inside one tile.
struct Run {
  int32_t offset;  // of the first one in its tile
  int32_t length;
  int32_t row, column;
  int64_t ordinal;  // of the first one: its index among the keys of the valid rectangle, in row-major order
};

struct Tile {
  int32_t first_run, runs, keys;
};

// The visited keys of one image.
struct Keys {
  const Run* runs;
  const Tile* tiles;
  int64_t count;  // of tiles
};

struct Problem {
  Stored stored;
  // Dense spatial keys: `spatial` is [batch, keys, …], `columns` is null, the grid has one row.
  Tensor4 q_content, q_spatial, k_content, spatial, columns, v;
  int64_t batch, queries, heads, keys, height, width;
  int64_t d, ds, dv;
  const Keys* visited;  // for each image
  double scale;
  double dropout_p;
  // [batch, heads, keep_words, queries], or null without dropout: bit j of word w of a query is set if the weight of
  // the key with ordinal 32 w + j is kept.
  const uint32_t* keep;
  int64_t keep_words;

  bool is_separable() const { return columns.data != nullptr; }
};

// Contiguous: out [batch, queries, heads, dv]; lse [batch, heads, queries], float64 for float64, else float32.
struct Result {
  void* out;
  void* lse;
};

// The part of one image's head that one task computes; the same for any number of threads.
struct Task {
  int64_t image, head, begin, end;  // forward: queries; backward: tiles
};

struct Upstream {
  const void* grad;  // of out, contiguous
  const void* out;
  const void* lse;
};

// Gradients of the inputs, contiguous; those of padding are zero before. `columns` is null for dense keys.
struct Gradients {
  void *q_content, *q_spatial, *k_content, *spatial, *columns, *v;
};

#define CONDDETR_DECLARE(level)                                                                               \
  namespace level {                                                                                           \
  void forward(const Problem&, const Result&, const Task&);                                                   \
  /* Bytes of the sums of one task of `backward`; `finish` reads those of all tasks of one head and image. */ \
  void partial_bytes(const Problem&, size_t& bytes);                                                          \
  void backward(const Problem&, const Upstream&, const Gradients&, const Task&, void* partial);               \
  void finish(const Problem&, const Gradients&, int64_t image, int64_t head, void* partials, int64_t count);  \
  }
CONDDETR_FOR_EACH_LEVEL(CONDDETR_DECLARE)
#undef CONDDETR_DECLARE

}  // namespace conddetr::attn
