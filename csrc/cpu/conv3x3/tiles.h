// Positions of tiles in the image and in memory, and the transform of a tile's window of inputs.
#pragma once

#include "common/product.h"
#include "cpu/conv3x3/transforms.h"

namespace conddetr::conv3x3::CONDDETR_LEVEL {
namespace {

// Adjacent input channels in a packed factor.
constexpr int kDepth = int(kChannels);

// Position of a tile.
struct Place {
  int64_t image, y, x;
};

Place place(const Problem& p, int64_t tile) {
  const int64_t across = p.tiles_across(), down = p.tiles_down();
  return {tile / (down * across), tile / across % down * kTile, tile % across * kTile};
}

// A gap of one cache line between the 36 factors, in numbers: otherwise they would share cache sets.
template <typename Real>
constexpr int64_t kGap = 64 / int64_t(sizeof(Real));

int64_t whole_rows(int64_t tiles) { return (tiles + kRows - 1) / kRows * kRows; }

// Sizes of a block's transformed tiles.
template <typename Real>
int64_t input_plane(const Problem& p, int64_t tiles) {
  return whole_rows(tiles) * p.in_channels + kGap<Real>;
}

// A row of `product` past the last channel reads a little further than the last tile.
template <typename Real>
int64_t gradient_plane(const Problem& p, int64_t tiles) {
  return tiles * p.out_channels + kRows + kGap<Real>;
}

template <typename Real>
int64_t weight_plane(const Problem& p) {
  return p.in_channels * kPanel<Real> + kGap<Real>;
}

template <typename Real>
int64_t product_plane(int64_t tiles) {
  return whole_rows(tiles) * kPanel<Real> + kGap<Real>;
}

// The 36 factors of a tile's window, each at target(channel), `plane` numbers from one to the next.
template <typename Real, typename Target>
CONDDETR_INLINE void transform_window(const Problem& p, int64_t tile, const Target& target, int64_t plane) {
  constexpr int L = kLanes<Real>;
  const Place at = place(p, tile);
  const Real* image = static_cast<const Real*>(p.x) + at.image * p.height * p.width * p.in_channels;
  // Null for cells outside the image.
  const Real* cells[kWindow][kWindow];
  for (int i = 0; i < kWindow; ++i) {
    for (int j = 0; j < kWindow; ++j) {
      const int64_t y = at.y + i - 1, x = at.x + j - 1;
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      cells[i][j] = inside ? image + (y * p.width + x) * p.in_channels : nullptr;
    }
  }
  for (int64_t channel = 0; channel < p.in_channels; channel += L) {
    Six<Real> half[kWindow];
    for (int j = 0; j < kWindow; ++j) {
      Six<Real> column, done;
      for (int i = 0; i < kWindow; ++i) {
        column[i] = cells[i][j] ? load_vector(cells[i][j] + channel) : Vector<Real>{};
      }
      transform_input<Real>(column, done);
      for (int i = 0; i < kWindow; ++i) half[i][j] = done[i];
    }
    Real* to = target(channel);
    for (int i = 0; i < kWindow; ++i) {
      Six<Real> done;
      transform_input<Real>(half[i], done);
      for (int j = 0; j < kWindow; ++j) store_vector(to + (i * kWindow + j) * plane, done[j]);
    }
  }
}

}  // namespace
}  // namespace conddetr::conv3x3::CONDDETR_LEVEL
