// Storage types of numbers, and the compute type: float32, or float64 for float64 (which is for tests).
#pragma once

#include <stdint.h>
#include <string.h>

namespace conddetr {

enum class Stored { f32, bf16, f64 };

struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct ComputeOf {
  using type = T;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

// These are `static`: every file that includes them has a separate copy, compiled for its instruction set.
template <typename T>
static inline Compute<T> load(T value) {
  return value;
}

static inline float load(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

template <typename T>
static inline void store(T& target, Compute<T> value) {
  target = value;
}

// Rounds to the nearest, ties to even; NaN stays NaN.
static inline void store(BFloat16& target, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  target.bits = uint16_t(value != value ? 0x7FC0u : rounded);
}

}  // namespace conddetr

// Runs `function<T>(arguments)` for the type that `stored` names.
#define CONDDETR_FOR_STORED(stored, function, ...)                                   \
  do {                                                                               \
    switch (stored) {                                                                \
      case conddetr::Stored::f32: function<float>(__VA_ARGS__); break;               \
      case conddetr::Stored::bf16: function<conddetr::BFloat16>(__VA_ARGS__); break; \
      case conddetr::Stored::f64: function<double>(__VA_ARGS__); break;              \
    }                                                                                \
  } while (false)
