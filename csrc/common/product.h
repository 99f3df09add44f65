// The matrix product on packed panels: the only one on the CPU.
#pragma once

#include "common/simd.h"

namespace conddetr {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 12;  // 24 sums, 2 columns and a factor: 27 of 32 registers
#else
constexpr int kRows = 6;  // 15 of AVX2's 16 registers
#endif

// Columns of a packed panel.
template <typename Real>
constexpr int kPanel = 2 * kLanes<Real>;

// A B in registers, to be inlined into a function that is not inlined itself. B is a packed panel, [depth][kPanel];
// element (m, k) of A is at m · kRowStride + k · kDepthStride, known at compile time so that every address is a
// constant offset.
template <int kRowStride, int kDepthStride, typename Real>
CONDDETR_INLINE void sum_products(int64_t depth, const Real* a, const Real* b, Vector<Real> (&sums)[kRows][2]) {
  constexpr int L = kLanes<Real>;
  for (int m = 0; m < kRows; ++m) sums[m][0] = sums[m][1] = Vector<Real>{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<Real> left = load_vector(b), right = load_vector(b + L);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      const Vector<Real> factor = broadcast(a[m * kRowStride]);
      sums[m][0] += factor * left;
      sums[m][1] += factor * right;
    }
    a += kDepthStride;
    b += 2 * L;
  }
}

// C[kRows][panel] += A B, or = A B. The products are summed from zero and added to C at the end, which rounds less than
// one long sum.
template <int kRowStride, int kDepthStride, bool kAdd = true, typename Real>
__attribute__((noinline)) void product(int64_t depth, const Real* a, const Real* b, Real* c, int64_t c_stride) {
  constexpr int L = kLanes<Real>;
  Vector<Real> sums[kRows][2];
  sum_products<kRowStride, kDepthStride>(depth, a, b, sums);
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    Real* row = c + m * c_stride;
    store_vector(row, kAdd ? load_vector(row) + sums[m][0] : sums[m][0]);
    store_vector(row + L, kAdd ? load_vector(row + L) + sums[m][1] : sums[m][1]);
  }
}

}  // namespace
}  // namespace conddetr
