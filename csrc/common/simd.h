// Vectors of the instruction set that this file is compiled for, as the compiler's own vector types.
//
// Everything is in an unnamed namespace, here and in the headers that build on it (product.h, exp2.h, lanes.h): each
// file has a separate copy, compiled for its instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/stored.h"

#define CONDDETR_INLINE static inline __attribute__((always_inline))

namespace conddetr {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
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

// to[i] = from[i] · factor
template <typename T, typename Real>
CONDDETR_INLINE void scale(Real* to, const T* from, int64_t count, Real factor) {
  constexpr int L = kLanes<Real>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store_vector(to + i, load_vector(from + i) * factor);
  for (; i < count; ++i) to[i] = load(from[i]) * factor;
}

}  // namespace
}  // namespace conddetr
