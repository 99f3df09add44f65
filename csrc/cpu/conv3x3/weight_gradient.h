// The gradient of the weights from a block of tiles: transformed inputs and gradients, products, their sum.
#pragma once

#include "cpu/conv3x3/tiles.h"

namespace conddetr::conv3x3::CONDDETR_LEVEL {
namespace {

// The 36 factors of a tile's gradients, as `transform_window` writes those of its inputs.
template <typename Real, typename Target>
CONDDETR_INLINE void transform_gradients(const Problem& p, int64_t tile, const Target& target, int64_t plane) {
  constexpr int L = kLanes<Real>;
  const Place at = place(p, tile);
  const Real* image = static_cast<const Real*>(p.grad) + at.image * p.height * p.width * p.out_channels;
  for (int64_t channel = 0; channel < p.out_channels; channel += L) {
    Six<Real> half[kTile];
    for (int i = 0; i < kTile; ++i) {
      Vector<Real> row[kTile] = {};
      for (int j = 0; j < kTile && at.y + i < p.height && at.x + j < p.width; ++j) {
        row[j] = load_vector(image + ((at.y + i) * p.width + at.x + j) * p.out_channels + channel);
      }
      transform_gradient<Real>(row, half[i]);
    }
    Real* to = target(channel);
    for (int j = 0; j < kWindow; ++j) {
      const Vector<Real> column[] = {half[0][j], half[1][j], half[2][j], half[3][j]};
      Six<Real> done;
      transform_gradient<Real>(column, done);
      for (int i = 0; i < kWindow; ++i) store_vector(to + (i * kWindow + j) * plane, done[i]);
    }
  }
}

// Transforms inputs to the layout of `product`'s right factor, [in / kPanel][tiles][kPanel], and gradients to that of
// its left factor, transposed: [out / kDepth][tiles][kDepth].
template <typename Real>
void transform_both_of(const Problem& p, const Block& block, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    Real* input = static_cast<Real*>(block.inputs) + tile * kPanel<Real>;
    Real* gradient = static_cast<Real*>(block.gradients) + tile * kDepth;
    const int64_t count = block.count;
    const auto input_target = [=](int64_t channel) {
      return input + channel / kPanel<Real> * count * kPanel<Real> + channel % kPanel<Real>;
    };
    const auto gradient_target = [=](int64_t channel) {
      return gradient + channel / kDepth * count * kDepth + channel % kDepth;
    };
    transform_window<Real>(p, block.first + tile, input_target, input_plane<Real>(p, count));
    transform_gradients<Real>(p, block.first + tile, gradient_target, gradient_plane<Real>(p, count));
  }
}

// Adds one vector of input channels of one output channel, from the 36 sums `plane` numbers apart, to the gradient.
template <typename Real>
void write_weights(const Problem& p, int64_t out, int64_t in, const Real* sums, int64_t plane, bool is_first) {
  Vector<Real> half[3][kWindow];
  for (int j = 0; j < kWindow; ++j) {
    Six<Real> column;
    for (int i = 0; i < kWindow; ++i) column[i] = load_vector(sums + (i * kWindow + j) * plane);
    Vector<Real> done[3];
    transform_sum<Real>(column, done);
    for (int i = 0; i < 3; ++i) half[i][j] = done[i];
  }
  Real* weight = static_cast<Real*>(p.out) + out * 9 * p.in_channels + in;
  for (int i = 0; i < 3; ++i) {
    Vector<Real> done[3];
    transform_sum<Real>(half[i], done);
    for (int j = 0; j < 3; ++j) {
      Real* cell = weight + (3 * i + j) * p.in_channels;
      store_vector(cell, is_first ? done[j] : load_vector(cell) + done[j]);
    }
  }
}

// The last rows of `product` do not belong to this task's channels and are not used.
constexpr int kSumRows = (kDepth + kRows - 1) / kRows * kRows;
// Tiles of both factors that the first-level cache holds.
constexpr int64_t kTilesAtOnce = 96;

template <typename Real>
void multiply_weights_of(const Problem& p, const Block& block, int64_t out, int64_t in, char* memory) {
  Real* sums = reinterpret_cast<Real*>(memory);
  const int64_t count = block.count, plane = product_plane<Real>(kSumRows);
  const Real* gradients = static_cast<const Real*>(block.gradients) + out * count;
  const Real* inputs = static_cast<const Real*>(block.inputs) + in * count;
  for (int point = 0; point < kPoints; ++point) {
    const Real *left = gradients + point * gradient_plane<Real>(p, count),
               *right = inputs + point * input_plane<Real>(p, count);
    for (int64_t tile = 0; tile < count; tile += kTilesAtOnce) {
      const int64_t depth = count - tile < kTilesAtOnce ? count - tile : kTilesAtOnce;
      for (int row = 0; row < kSumRows; row += kRows) {
        const Real *a = left + tile * kDepth + row, *b = right + tile * kPanel<Real>;
        Real* c = sums + point * plane + row * kPanel<Real>;
        if (tile == 0) {
          product<1, kDepth, false>(depth, a, b, c, kPanel<Real>);
        } else {
          product<1, kDepth>(depth, a, b, c, kPanel<Real>);
        }
      }
    }
  }
  for (int row = 0; row < kDepth; ++row) {
    for (int64_t lane = 0; lane < kPanel<Real>; lane += kLanes<Real>) {
      write_weights(p, out + row, in + lane, sums + row * kPanel<Real> + lane, plane, block.first == 0);
    }
  }
}

}  // namespace
}  // namespace conddetr::conv3x3::CONDDETR_LEVEL
