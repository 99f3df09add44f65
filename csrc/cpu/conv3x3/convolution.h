// The convolution of a block of tiles: transformed inputs, products, outputs.
#pragma once

#include "common/lanes.h"
#include "cpu/conv3x3/tiles.h"

namespace conddetr::conv3x3::CONDDETR_LEVEL {
namespace {

// Transforms inputs to the layout of `product`'s left factor: [tiles / kRows][in / kDepth][kRows][kDepth].
template <typename Real>
void transform_inputs_of(const Problem& p, const Block& block, int64_t begin, int64_t end) {
  const int64_t plane = input_plane<Real>(p, block.count);
  for (int64_t tile = begin; tile < end; ++tile) {
    Real* to = static_cast<Real*>(block.inputs) + tile / kRows * kRows * p.in_channels + tile % kRows * kDepth;
    const auto target = [to](int64_t channel) { return to + channel / kDepth * kDepth * kRows + channel % kDepth; };
    transform_window<Real>(p, block.first + tile, target, plane);
  }
}

// Transforms weights of `kPanel` output channels from `channel` on to the layout of `product`'s right factor,
// [in][kPanel] for each of the 36; `plane` numbers from one to the next.
template <typename Real>
void transform_weights(const Problem& p, int64_t channel, Real* to, int64_t plane) {
  constexpr int L = kLanes<Real>;
  const Real* weight = static_cast<const Real*>(p.weight) + channel * p.weight_out;
  // The contiguous channels are read in vectors; if they are the input channels, the vectors are transposed.
  const bool is_transposed = p.weight_in == 1;
  for (int64_t in = 0; in < p.in_channels; in += L) {
    for (int64_t out = 0; out < kPanel<Real>; out += L) {
      Vector<Real> cells[9][L];
      for (int cell = 0; cell < 9; ++cell) {
        const Real* source =
            weight + cell / 3 * p.weight_y + cell % 3 * p.weight_x + in * p.weight_in + out * p.weight_out;
        for (int i = 0; i < L; ++i) {
          cells[cell][i] = load_vector(source + i * (is_transposed ? p.weight_out : p.weight_in));
        }
        if (is_transposed) transpose<Real>(cells[cell]);
      }
      for (int i = 0; i < L; ++i) {
        Vector<Real> half[kWindow][3];
        for (int x = 0; x < 3; ++x) {
          const Vector<Real> column[] = {cells[x][i], cells[3 + x][i], cells[6 + x][i]};
          Six<Real> done;
          transform_weight<Real>(column, done);
          for (int y = 0; y < kWindow; ++y) half[y][x] = done[y];
        }
        Real* target = to + (in + i) * kPanel<Real> + out;
        for (int y = 0; y < kWindow; ++y) {
          Six<Real> done;
          transform_weight<Real>(half[y], done);
          for (int x = 0; x < kWindow; ++x) store_vector(target + (y * kWindow + x) * plane, done[x]);
        }
      }
    }
  }
}

// Writes one vector of output channels of a tile, from the 36 products `plane` numbers apart, to out.
template <typename Real>
void write_tile(const Problem& p, int64_t tile, int64_t channel, const Real* products, int64_t plane) {
  const Place at = place(p, tile);
  Vector<Real> half[kTile][kWindow], bias = {};
  for (int j = 0; j < kWindow; ++j) {
    Six<Real> column;
    for (int i = 0; i < kWindow; ++i) column[i] = load_vector(products + (i * kWindow + j) * plane);
    Vector<Real> done[kTile];
    transform_output<Real>(column, done);
    for (int i = 0; i < kTile; ++i) half[i][j] = done[i];
  }
  if (p.bias != nullptr) bias = load_vector(static_cast<const Real*>(p.bias) + channel);
  Real* image = static_cast<Real*>(p.out) + at.image * p.height * p.width * p.out_channels + channel;
  for (int i = 0; i < kTile && at.y + i < p.height; ++i) {
    Vector<Real> done[kTile];
    transform_output<Real>(half[i], done);
    for (int j = 0; j < kTile && at.x + j < p.width; ++j) {
      Vector<Real> value = done[j] + bias;
      // NaN stays NaN.
      if (p.relu) value = value <= Vector<Real>{} ? Vector<Real>{} : value;
      store_vector(image + ((at.y + i) * p.width + at.x + j) * p.out_channels, value);
    }
  }
}

template <typename Real>
void multiply_block(const Problem& p, const Block& block, int64_t begin, int64_t end, int64_t channel, char* memory) {
  constexpr int L = kLanes<Real>;
  const int64_t inputs = input_plane<Real>(p, block.count), plane = product_plane<Real>(end - begin);
  const int64_t weights = weight_plane<Real>(p);
  Real* right = reinterpret_cast<Real*>(memory);
  Real* products = right + kPoints * weights;
  transform_weights(p, channel, right, weights);
  for (int point = 0; point < kPoints; ++point) {
    const Real* left = static_cast<const Real*>(block.inputs) + point * inputs + begin * p.in_channels;
    for (int64_t row = 0; row < end - begin; row += kRows) {
      Real* sums = products + point * plane + row * kPanel<Real>;
      const Real* factor = right + point * weights;
      product<kDepth, 1, false>(kDepth, left, factor, sums, kPanel<Real>);
      for (int64_t in = kDepth; in < p.in_channels; in += kDepth) {
        product<kDepth, 1>(kDepth, left + in * kRows, factor + in * kPanel<Real>, sums, kPanel<Real>);
      }
      left += kRows * p.in_channels;
    }
  }
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t out = 0; out < kPanel<Real>; out += L) {
      const Real* tile_products = products + (tile - begin) * kPanel<Real> + out;
      write_tile(p, block.first + tile, channel + out, tile_products, plane);
    }
  }
}

}  // namespace
}  // namespace conddetr::conv3x3::CONDDETR_LEVEL
