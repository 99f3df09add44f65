// Operations across the lanes of vectors: shuffles, sums, the largest, transposes.
#pragma once

#include <utility>

#include "common/simd.h"

namespace conddetr {
namespace {

#if defined(__clang__) || __GNUC__ >= 12
#define CONDDETR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CONDDETR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers<Real>{__VA_ARGS__})
#endif

template <typename Real, int kFirst, int... kLane>
CONDDETR_INLINE Vector<Real> interleave(Vector<Real> a, Vector<Real> b, std::integer_sequence<int, kLane...>) {
  return CONDDETR_SHUFFLE(a, b, (kFirst + kLane / 2 + kLane % 2 * kLanes<Real>)...);
}

// Lanes of a and b alternately, from lane kFirst on.
template <typename Real, int kFirst>
CONDDETR_INLINE Vector<Real> interleave(Vector<Real> a, Vector<Real> b) {
  return interleave<Real, kFirst>(a, b, std::make_integer_sequence<int, kLanes<Real>>());
}

template <typename Real, int kBy, int... kLane>
CONDDETR_INLINE Vector<Real> rotate(Vector<Real> a, std::integer_sequence<int, kLane...>) {
  return CONDDETR_SHUFFLE(a, a, ((kLane + kBy) % kLanes<Real>)...);
}

// The sum of all lanes, by halves.
template <typename Real, int kBy = kLanes<Real> / 2>
CONDDETR_INLINE Real sum_of(Vector<Real> value) {
  value += rotate<Real, kBy>(value, std::make_integer_sequence<int, kLanes<Real>>());
  if constexpr (kBy > 1) {
    return sum_of<Real, kBy / 2>(value);
  } else {
    return value[0];
  }
}

template <typename Real>
CONDDETR_INLINE Real largest_of(Vector<Real> value) {
  Real largest = value[0];
  for (int i = 1; i < kLanes<Real>; ++i) largest = value[i] > largest ? value[i] : largest;
  return largest;
}

// The first `count` lanes, zeros in the others.
template <typename Real>
CONDDETR_INLINE Vector<Real> first_lanes(Vector<Real> value, int64_t count) {
  Integers<Real> lane;
  for (int i = 0; i < kLanes<Real>; ++i) lane[i] = i;
  return lane < decltype(lane[0] + 0)(count) ? value : Vector<Real>{};
}

// Σ a[i] · b[i]
template <typename T>
CONDDETR_INLINE Compute<T> dot(const T* a, const T* b, int64_t count) {
  constexpr int L = kLanes<Compute<T>>;
  Vector<Compute<T>> sums = {};
  int64_t i = 0;
  for (; i + L <= count; i += L) sums += load_vector(a + i) * load_vector(b + i);
  Compute<T> total = sum_of<Compute<T>>(sums);
  for (; i < count; ++i) total += load(a[i]) * load(b[i]);
  return total;
}

// A square of kLanes × kLanes numbers, transposed: log2(kLanes) rounds of perfect shuffles of the rows.
template <typename Real>
CONDDETR_INLINE void transpose(Vector<Real>* rows) {
  constexpr int L = kLanes<Real>;
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vector<Real> next[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<Real, 0>(rows[i], rows[i + L / 2]);
      next[2 * i + 1] = interleave<Real, L / 2>(rows[i], rows[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

}  // namespace
}  // namespace conddetr
