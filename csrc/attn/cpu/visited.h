// The visited keys: those of the valid rectangle, or those that the mask does not hide. Part of cpu.cpp.
#pragma once

#include <algorithm>
#include <vector>

#include "attn/kernels.h"
#include "common/rectangle.h"

namespace conddetr::attn {
namespace {

// The visited keys of one image, in tiles.
struct Visited {
  std::vector<Run> runs;
  std::vector<Tile> tiles;

  void add(int32_t row, int32_t column, int32_t length, int64_t ordinal) {
    while (length > 0) {
      if (tiles.empty() || tiles.back().keys == kTileKeys) tiles.push_back({int32_t(runs.size()), 0, 0});
      Tile& tile = tiles.back();
      const int32_t fits = std::min(length, kTileKeys - tile.keys);
      runs.push_back({tile.keys, fits, row, column, ordinal});
      tile.keys += fits;
      ++tile.runs;
      column += fits;
      ordinal += fits;
      length -= fits;
    }
  }
};

Visited visit(const int32_t* valid_cells, const bool* padding, int64_t image, int32_t height, int32_t width) {
  Visited visited;
  const Rectangle valid = valid_rectangle(valid_cells, image, height, width);
  for (int32_t y = 0; y < valid.height; ++y) {
    if (padding == nullptr) {
      visited.add(y, 0, valid.width, int64_t(y) * valid.width);
      continue;
    }
    const bool* row = padding + (image * height + y) * width;
    for (int32_t x = 0; x < width;) {
      const int32_t start = x;
      while (x < width && !row[x]) ++x;
      visited.add(y, start, x - start, int64_t(y) * width + start);
      while (x < width && row[x]) ++x;
    }
  }
  return visited;
}

}  // namespace
}  // namespace conddetr::attn
