// philox::randint4x for a whole vector of consecutive counters.
#pragma once

#include "common/lanes.h"
#include "common/philox.h"

namespace conddetr {
namespace {

typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
constexpr int kCounters = kVectorBytes / 8;

// Products of the lower halves, with 64 bits; the upper halves are ignored.
CONDDETR_INLINE Wide multiply_lower(Wide a, uint32_t b) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * uint64_t(b);
#endif
}

struct WideFour {
  Wide lane[4];
};

// The four random numbers of each counter, in the lower halves; the upper halves have no meaning.
CONDDETR_INLINE WideFour random_lanes(uint64_t seed, Wide counter) {
  Wide c0 = counter, c1 = counter >> 32, c2 = {}, c3 = {};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < philox::kRounds; ++round) {
    const Wide a = multiply_lower(c0, philox::kMultiplierA), b = multiply_lower(c2, philox::kMultiplierB);
    c0 = (b >> 32) ^ c1 ^ uint64_t(k0);
    c2 = (a >> 32) ^ c3 ^ uint64_t(k1);
    c1 = b;
    c3 = a;
    k0 += philox::kWeylA;
    k1 += philox::kWeylB;
  }
  return {{c0, c1, c2, c3}};
}

// Writes the 4 · kCounters numbers of counters `first`, `first` + 1, …, those of one counter next to each other.
CONDDETR_INLINE void random_numbers(uint64_t seed, uint64_t first, uint32_t* to) {
  Wide counter;
  for (int i = 0; i < kCounters; ++i) counter[i] = first + uint64_t(i);
  const WideFour numbers = random_lanes(seed, counter);
  const auto pairs = [&](int lane) {
    return (Vector<double>)((numbers.lane[lane] & 0xFFFFFFFFu) | (numbers.lane[lane + 1] << 32));
  };
  const Vector<double> left = pairs(0), right = pairs(2);
  const Vector<double> halves[] = {interleave<double, 0>(left, right), interleave<double, kCounters / 2>(left, right)};
  memcpy(to, halves, sizeof halves);
}

}  // namespace
}  // namespace conddetr
