// The online softmax of a block of queries. A running reference replaces the maximum: it is the maximum of the first
// tile, and rises only if a later weight exceeds it by 2^30.
#pragma once

#include "attn/cpu/keep.h"
#include "common/exp2.h"
#include "common/lanes.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

// The state of one block of kRows queries between tiles.
template <typename Real>
struct Running {
  Real reference[kRows];
  Vector<Real> total[kRows];
};

// Turns scores into weights in place, zero if dropped, and adds the sums of all weights, kept or not, to `total`.
// Returns the largest sum of a lane.
template <bool kDrops, typename Real>
CONDDETR_INLINE Real make_weights(Real* scores, int64_t keys, const Kept& kept, Vector<Real>* total) {
  constexpr int L = kLanes<Real>;
  Vector<Real> worst = {};
  for (int m = 0; m < kRows; ++m) {
    Vector<Real> sum = {};
    Integers<Real> bits = {};
    for (int64_t i = 0; i < keys; i += L) {
      const Vector<Real> weight = exp2<Real>(load_vector(scores + m * kStride + i));
      if (kDrops) bits = i % kWord == 0 ? spread<Real>(kept.words[i / kWord][m]) : bits >> L;
      store_vector(scores + m * kStride + i, kDrops ? keep<Real>(weight, bits) : weight);
      sum += weight;
    }
    total[m] += sum;
    worst = sum > worst ? sum : worst;
  }
  return largest_of<Real>(worst);
}

// Raises each query's reference to the maximum of its scores, if that is higher, and shrinks the sums so far. Before
// the first tile there is no reference and no sum.
template <typename Real>
void raise_reference(Real* scores, int64_t keys, Running<Real>& running, const Shape<Real>& shape, int64_t height,
                     Real* start, Real* sums, bool is_first) {
  constexpr int L = kLanes<Real>;
  for (int m = 0; m < kRows; ++m) {
    Real* row = scores + m * kStride;
    Vector<Real> highest = load_vector(row);
    for (int64_t i = L; i < keys; i += L) {
      const Vector<Real> next = load_vector(row + i);
      highest = next > highest ? next : highest;
    }
    const Real largest = largest_of<Real>(highest), rise = is_first || largest > 0 ? largest : Real(0);
    for (int64_t i = 0; i < keys; i += L) store_vector(row + i, load_vector(row + i) - rise);
    running.reference[m] += rise;
    for (int64_t y = 0; y < height; ++y) start[m * shape.start + shape.rows + y] -= rise;
    if (is_first) continue;
    const Vector<Real> shrink = exp2<Real>(broadcast(-rise));
    running.total[m] *= shrink;
    for (int64_t panel = 0; panel * kPanel<Real> < shape.values; ++panel) {
      Real* sum = sums + (panel * kRows + m) * kPanel<Real>;
      for (int i = 0; i < kPanel<Real>; i += L) store_vector(sum + i, load_vector(sum + i) * shrink);
    }
  }
}

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
