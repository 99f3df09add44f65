// The valid rectangle of an image's grid of keys.
#pragma once

#include <stdint.h>

#include "common/portable.h"

namespace conddetr {

CONDDETR_BOTH int32_t clamp(int32_t value, int32_t highest) {
  return value < 0 ? 0 : (value > highest ? highest : value);
}

// Valid height and width, clamped to the grid: a wrong `valid_cells` never reads outside.
struct Rectangle {
  int32_t height, width;
};

CONDDETR_BOTH Rectangle valid_rectangle(const int32_t* valid_cells, int64_t image, int32_t height, int32_t width) {
  if (valid_cells == nullptr) return {height, width};
  return {clamp(valid_cells[2 * image], height), clamp(valid_cells[2 * image + 1], width)};
}

}  // namespace conddetr
