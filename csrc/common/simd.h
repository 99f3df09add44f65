// Vectors of the instruction set that this file is compiled for, as the compiler's own vector types, and the two
// building blocks of CPU kernels: a matrix product on packed panels, and 2^x.
//
// Everything is in an unnamed namespace: each file has its own copy, compiled for its own instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/stored.h"

#define CONDDETR_INLINE static inline __attribute__((always_inline))

namespace conddetr {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 12;  // 24 sums, 2 columns and a factor: 27 of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRows = 6;  // 15 of 16 registers
#else
constexpr int kVectorBytes = 16, kRows = 6;
#endif

template <typename Real>
struct Types;
template <>
struct Types<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct Types<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
};
template <typename Real>
using Vector = typename Types<Real>::Vector;
template <typename Real>
using Integers = typename Types<Real>::Integers;
template <typename Real>
constexpr int kLanes = kVectorBytes / int(sizeof(Real));
// Columns of a packed panel.
template <typename Real>
constexpr int kPanel = 2 * kLanes<Real>;

template <typename Real>
CONDDETR_INLINE Vector<Real> broadcast(Real value) {
  return value - Vector<Real>{};
}

template <typename Real>
CONDDETR_INLINE Vector<Real> load_vector(const Real* from) {
  Vector<Real> value;
  memcpy(&value, from, sizeof value);
  return value;
}

CONDDETR_INLINE Vector<float> load_vector(const BFloat16* from) {
  Types<float>::Halves halves;
  memcpy(&halves, from, sizeof halves);
  const Integers<float> bits = __builtin_convertvector(halves, Integers<float>) << 16;
  return (Vector<float>)bits;
}

template <typename Real>
CONDDETR_INLINE void store_vector(Real* to, Vector<Real> value) {
  memcpy(to, &value, sizeof value);
}

// The larger and the smaller of both; b where one of them is NaN.
template <typename Real>
CONDDETR_INLINE Vector<Real> larger(Vector<Real> a, Vector<Real> b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // GCC makes two instructions of the comparison.
  if constexpr (sizeof(Real) == 4) return (Vector<Real>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

template <typename Real>
CONDDETR_INLINE Vector<Real> smaller(Vector<Real> a, Vector<Real> b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) return (Vector<Real>)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}

// to[i] = from[i] · factor
template <typename T, typename Real>
CONDDETR_INLINE void scale(Real* to, const T* from, int64_t count, Real factor) {
  constexpr int L = kLanes<Real>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store_vector(to + i, load_vector(from + i) * factor);
  for (; i < count; ++i) to[i] = load(from[i]) * factor;
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

// A B in registers, to be inlined into a function whose registers are its own: the only matrix product there is. B is a
// packed panel, [depth][kPanel]; element (m, k) of A is at m · kRowStride + k · kDepthStride, known when compiling so
// that every address is a constant offset.
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

template <typename Real>
struct Exp2;
// Least squares of degree 6 on [-1/2, 1/2], exactly 1 at 0: relative error 1.6e-8, below that of all rounding.
template <>
struct Exp2<float> {
  static constexpr float series[] = {1.0f,          0.693147182f,   0.240226477f,   0.0555032901f,
                                     0.00961837359f, 0.00133998483f, 0.000153707049f};
  static constexpr float round = 12582912.0f, lowest = -126.0f, highest = 127.0f;
  static constexpr int mantissa = 23;
};
// Taylor series of degree 13: error 4e-18, below rounding.
template <>
struct Exp2<double> {
  static constexpr double series[] = {1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158,
                                      0.009618129107628477, 0.0013333558146428443, 0.00015403530393381608,
                                      1.525273380405984e-05, 1.3215486790144307e-06, 1.0178086009239699e-07,
                                      7.054911620801123e-09, 4.445538271870811e-10, 2.5678435993488206e-11,
                                      1.3691488853904128e-12};
  static constexpr double round = 6755399441055744.0, lowest = -1022.0, highest = 1023.0;
  static constexpr int mantissa = 52;
};

// 2^x. It saturates: below the lowest normal exponent the result is at most that power of two, above the highest it is
// enormous (2^127 or infinite in float32). A NaN stays one.
template <typename Real>
CONDDETR_INLINE Vector<Real> exp2(Vector<Real> x) {
  using E = Exp2<Real>;
  constexpr int degree = sizeof(E::series) / sizeof(Real) - 1;
#if defined(__AVX512F__)
  constexpr bool has_scale = sizeof(Real) == 4;
#else
  constexpr bool has_scale = false;
#endif
  Vector<Real> whole, shifted;
  if constexpr (has_scale) {
#if defined(__AVX512F__)
    whole = (Vector<Real>)_mm512_roundscale_ps((__m512)x, 8);
#endif
  } else {
    x = larger<Real>(broadcast<Real>(E::lowest), x);
    x = smaller<Real>(broadcast<Real>(E::highest), x);
    // Adding 1.5 · 2^mantissa rounds to a whole number, and leaves it in the lowest bits.
    shifted = x + E::round;
    whole = shifted - E::round;
  }
  const Vector<Real> fraction = x - whole;
  Vector<Real> result = broadcast<Real>(E::series[degree]);
#pragma GCC unroll 13
  for (int i = degree - 1; i >= 0; --i) result = result * fraction + E::series[i];
  if constexpr (has_scale) {
#if defined(__AVX512F__)
    return (Vector<Real>)_mm512_scalef_ps((__m512)result, (__m512)whole);
#endif
  }
  return (Vector<Real>)((Integers<Real>)result + ((Integers<Real>)shifted << E::mantissa));
}

#if defined(__clang__) || __GNUC__ >= 12
#define CONDDETR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CONDDETR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers<Real>{__VA_ARGS__})
#endif

template <typename Real, int kFirst, int... kLane>
CONDDETR_INLINE Vector<Real> interleave(Vector<Real> a, Vector<Real> b, std::integer_sequence<int, kLane...>) {
  return CONDDETR_SHUFFLE(a, b, (kFirst + kLane / 2 + kLane % 2 * kLanes<Real>)...);
}

// Lanes of a and b in turn, from lane kFirst on.
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
