// Operands of matrix products: copied to the order that `product` reads, and multiplied.
#pragma once

#include "attn/cpu/shape.h"
#include "common/lanes.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

// Copies channels of kRows items to a left factor, [depth / kDepth][kRows][kDepth], from channel `offset` on, times
// `factor`; zeros past the last item.
template <typename T>
void pack_left(Compute<T>* to, const T* from, int64_t stride, int64_t items, int64_t offset, int64_t channels,
               Compute<T> factor) {
  for (int64_t m = 0; m < kRows; ++m) {
    int64_t channel = 0;
    while (channel < channels) {
      const int64_t position = offset + channel, room = kDepth - position % kDepth;
      const int64_t count = channels - channel < room ? channels - channel : room;
      Compute<T>* target = to + position / kDepth * kDepth * kRows + m * kDepth + position % kDepth;
      const T* source = from + m * stride + channel;
      if (m < items) {
        scale(target, source, count, factor);
      } else {
        for (int64_t i = 0; i < count; ++i) target[i] = 0;
      }
      channel += count;
    }
  }
}

// Copies the items at `positions` to panels of items: element (channel, item) of panel i / kPanel. `to` starts at the
// first channel of the first panel; `depth` channels are between panels. Zeros past the last item.
template <typename T>
void pack_transposed(Compute<T>* to, int64_t depth, const T* from, int64_t stride, const int32_t* positions,
                     int64_t items, int64_t channels) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  for (int64_t first = 0; first < round_up(items, kPanel<Real>); first += L) {
    Real* panel = to + first / kPanel<Real> * depth * kPanel<Real> + first % kPanel<Real>;
    int64_t channel = 0;
    for (; channel + L <= channels; channel += L) {
      Vector<Real> square[L];
      for (int i = 0; i < L; ++i) {
        square[i] = first + i < items ? load_vector(from + positions[first + i] * stride + channel) : Vector<Real>{};
      }
      transpose<Real>(square);
      for (int i = 0; i < L; ++i) store_vector(panel + (channel + i) * kPanel<Real>, square[i]);
    }
    for (; channel < channels; ++channel) {
      for (int i = 0; i < L; ++i) {
        panel[channel * kPanel<Real> + i] =
            first + i < items ? load(from[positions[first + i] * stride + channel]) : Real(0);
      }
    }
  }
}

// Copies items to panels of channels: element (item, channel) of panel channel / kPanel, `length` items apart, times
// `factor`. Channels from `offset` on; all other numbers keep their values.
template <typename T>
void pack_straight(Compute<T>* to, int64_t length, const T* from, int64_t stride, const int32_t* positions,
                   int64_t items, int64_t offset, int64_t channels, Compute<T> factor) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  for (int64_t channel = 0; channel < channels;) {
    const int64_t position = offset + channel, room = kPanel<Real> - position % kPanel<Real>;
    const int64_t count = channels - channel < room ? channels - channel : room;
    const T* source = from + channel;
    Real* target = to + position / kPanel<Real> * length * kPanel<Real> + position % kPanel<Real>;
    for (int64_t item = 0; item < items; ++item, target += kPanel<Real>) {
      const T* numbers = source + positions[item] * stride;
      if (count == kPanel<Real>) {
        store_vector(target, load_vector(numbers) * factor);
        store_vector(target + L, load_vector(numbers + L) * factor);
      } else {
        scale(target, numbers, count, factor);
      }
    }
    channel += count;
  }
}

// The inverse for one item: channels from `offset` on, of panels that are `c_panel` numbers apart, times `factor`.
template <typename T>
void unpack_row(T* to, const Compute<T>* from, int64_t c_panel, int64_t offset, int64_t channels, Compute<T> factor) {
  constexpr int P = kPanel<Compute<T>>;
  for (int64_t channel = 0; channel < channels;) {
    const int64_t position = offset + channel, room = P - position % P;
    const int64_t count = channels - channel < room ? channels - channel : room;
    const Compute<T>* source = from + position / P * c_panel + position % P;
    for (int64_t i = 0; i < count; ++i) store(to[channel + i], source[i] * factor);
    channel += count;
  }
}

// C[kRows][columns] += left factor × panels, or = without kAdd; `c_panel` numbers between panels of C, `c_stride`
// between its rows.
template <bool kAdd = true, typename Real>
CONDDETR_INLINE void multiply(const Real* left, const Real* panels, int64_t depth, int64_t columns, Real* c,
                              int64_t c_panel, int64_t c_stride) {
  for (int64_t first = 0; first < depth; first += kDepth) {
    const int64_t count = depth - first < kDepth ? depth - first : kDepth;
    for (int64_t panel = 0; panel * kPanel<Real> < columns; ++panel) {
      const Real* right = panels + (panel * depth + first) * kPanel<Real>;
      if (kAdd || first > 0) {
        product<kDepth, 1>(count, left + first * kRows, right, c + panel * c_panel, c_stride);
      } else {
        product<kDepth, 1, false>(count, left + first * kRows, right, c + panel * c_panel, c_stride);
      }
    }
  }
}

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
