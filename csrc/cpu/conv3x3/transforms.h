// The five transforms of Winograd's minimal filtering, of one column. The polynomials are evaluated at 0, ±√½, ±√2 and
// infinity: half the rounding error of 0, ±1, ±2 and infinity.
#pragma once

#include "common/simd.h"
#include "cpu/conv3x3/kernels.h"

namespace conddetr::conv3x3::CONDDETR_LEVEL {
namespace {

template <typename Real>
using Six = Vector<Real>[kWindow];

// Bᵀ times a column.
template <typename Real>
CONDDETR_INLINE void transform_input(const Six<Real>& d, Six<Real>& to) {
  constexpr Real a = Real(0.70710678118654752), b = Real(1.41421356237309505);
  const Vector<Real> even_a = d[4] - Real(2) * d[2], odd_a = d[3] - Real(2) * d[1];
  const Vector<Real> even_b = d[4] - Real(0.5) * d[2], odd_b = d[3] - Real(0.5) * d[1];
  to[0] = d[0] + (d[4] - Real(2.5) * d[2]);
  to[1] = even_a + a * odd_a;
  to[2] = even_a - a * odd_a;
  to[3] = even_b + b * odd_b;
  to[4] = even_b - b * odd_b;
  to[5] = d[1] + (d[5] - Real(2.5) * d[3]);
}

// G times a column of three.
template <typename Real>
CONDDETR_INLINE void transform_weight(const Vector<Real>* g, Six<Real>& to) {
  constexpr Real a = Real(0.70710678118654752), b = Real(1.41421356237309505);
  const Vector<Real> even_a = g[0] + Real(0.5) * g[2], even_b = g[0] + Real(2) * g[2];
  to[0] = g[0];
  to[1] = Real(-2.0 / 3) * (even_a + a * g[1]);
  to[2] = Real(-2.0 / 3) * (even_a - a * g[1]);
  to[3] = Real(1.0 / 6) * (even_b + b * g[1]);
  to[4] = Real(1.0 / 6) * (even_b - b * g[1]);
  to[5] = g[2];
}

// Aᵀ times a column.
template <typename Real>
CONDDETR_INLINE void transform_output(const Six<Real>& m, Vector<Real>* to) {
  constexpr Real a = Real(0.70710678118654752), b = Real(1.41421356237309505);
  const Vector<Real> sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const Vector<Real> sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  to[0] = m[0] + (sum_a + sum_b);
  to[1] = a * difference_a + b * difference_b;
  to[2] = Real(0.5) * sum_a + Real(2) * sum_b;
  to[3] = m[5] + (Real(0.5) * a * difference_a + Real(2) * b * difference_b);
}

// A times a column of four.
template <typename Real>
CONDDETR_INLINE void transform_gradient(const Vector<Real>* y, Six<Real>& to) {
  constexpr Real a = Real(0.70710678118654752), b = Real(1.41421356237309505);
  const Vector<Real> even_a = y[0] + Real(0.5) * y[2], odd_a = y[1] + Real(0.5) * y[3];
  const Vector<Real> even_b = y[0] + Real(2) * y[2], odd_b = y[1] + Real(2) * y[3];
  to[0] = y[0];
  to[1] = even_a + a * odd_a;
  to[2] = even_a - a * odd_a;
  to[3] = even_b + b * odd_b;
  to[4] = even_b - b * odd_b;
  to[5] = y[3];
}

// Gᵀ times a column.
template <typename Real>
CONDDETR_INLINE void transform_sum(const Six<Real>& m, Vector<Real>* to) {
  constexpr Real a = Real(0.70710678118654752), b = Real(1.41421356237309505);
  const Vector<Real> sum_a = Real(-2.0 / 3) * (m[1] + m[2]), sum_b = Real(1.0 / 6) * (m[3] + m[4]);
  to[0] = m[0] + (sum_a + sum_b);
  to[1] = Real(-2.0 / 3) * a * (m[1] - m[2]) + Real(1.0 / 6) * b * (m[3] - m[4]);
  to[2] = m[5] + (Real(0.5) * sum_a + Real(2) * sum_b);
}

}  // namespace
}  // namespace conddetr::conv3x3::CONDDETR_LEVEL
