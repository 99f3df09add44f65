// The order of keys on GPUs. A key's ordinal counts the keys of the image's valid rectangle, row by row; those outside
// come after. A tile is 64 ordinals: the rectangle is padded to a multiple of 64 keys, no more, and dropout's bits,
// which are in the order of ordinals, are read without a shuffle. Dense keys are a grid of one row.
#pragma once

#include "common/rectangle.h"

namespace conddetr::attn {

constexpr int kTile = 64;  // rows of a tile

struct Keys {
  Rectangle valid;
  int grid_width;

  CONDDETR_BOTH Keys(Rectangle rectangle, int grid_width) : valid(rectangle), grid_width(grid_width) {
    if (valid.width == 0) valid.height = 0;
  }

  CONDDETR_BOTH int count() const { return valid.height * valid.width; }
  CONDDETR_BOTH int tiles() const { return (count() + kTile - 1) / kTile; }
  CONDDETR_BOTH bool is_whole(int tile) const { return (tile + 1) * kTile <= count(); }

  // A key's position in the grid, row by row, for any ordinal of the grid. It divides: not for inner loops.
  CONDDETR_BOTH int item(int ordinal) const {
    if (ordinal < count()) return ordinal / valid.width * grid_width + ordinal % valid.width;
    const int outside = ordinal - count(), beside = grid_width - valid.width;
    if (outside >= valid.height * beside) return outside + count();
    return outside / beside * grid_width + valid.width + outside % beside;
  }
};

// Steps through keys that are `step` ordinals apart, without a division for each.
struct Cursor {
  int x, y, step_x, step_y, width, height;

  CONDDETR_BOTH Cursor(const Keys& keys, int first, int step) : width(keys.valid.width), height(keys.valid.height) {
    if (width == 0) width = 1;
    y = first / width;
    x = first - y * width;
    step_y = step / width;
    step_x = step - step_y * width;
  }

  CONDDETR_BOTH bool is_inside() const { return y < height; }

  CONDDETR_BOTH void next() {
    x += step_x;
    y += step_y;
    if (x < width) return;
    x -= width;
    ++y;
  }
};

}  // namespace conddetr::attn
