// Dropout on the CPU. Compiled once for each instruction set.
//
// Lane i % 4 of Philox's numbers for the counter i / 4 decides whether element i survives, so the result does not
// depend on the number of threads.

#include "cpu/dropout/kernels.h"

#include "common/philox_simd.h"
#include "common/simd.h"

namespace conddetr::dropout::CONDDETR_LEVEL {
namespace {

template <typename Real>
struct Rule {
  uint32_t threshold;
  Real factor;
};

// `count` elements, with one random number each.
template <bool kRelu, bool kAdds, typename T>
CONDDETR_INLINE void drop(const Rule<Compute<T>>& rule, const T* x, const T* residual, const uint32_t* numbers, T* out,
                          int64_t count) {
  using Real = Compute<T>;
  for (int64_t i = 0; i < count; ++i) {
    Real value = load(x[i]);
    // Not a maximum: NaN stays NaN.
    if constexpr (kRelu) value = value <= 0 ? Real(0) : value;
    value = (numbers[i] >> 8) >= rule.threshold ? value * rule.factor : Real(0);
    if constexpr (kAdds) value += load(residual[i]);
    store(out[i], value);
  }
}

template <typename T>
void apply_to(const Problem& p, int64_t begin, int64_t end) {
  const Rule<Compute<T>> rule{philox::threshold(float(p.p)), Compute<T>(1 / (1 - p.p))};
  // The last random numbers of a partial chunk may be written beyond it.
  uint32_t numbers[kChunk + 4 * kCounters];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    for (int64_t i = 0; i < count; i += 4 * kCounters) random_numbers(p.seed, uint64_t(first + i) / 4, numbers + i);
    const T* x = static_cast<const T*>(p.x) + first;
    T* out = static_cast<T*>(p.out) + first;
    if (p.residual != nullptr) {
      const T* residual = static_cast<const T*>(p.residual) + first;
      drop<false, true>(rule, x, residual, numbers, out, count);
    } else if (p.relu) {
      drop<true, false, T>(rule, x, nullptr, numbers, out, count);
    } else {
      drop<false, false, T>(rule, x, nullptr, numbers, out, count);
    }
  }
}

}  // namespace

void apply(const Problem& p, int64_t begin, int64_t end) { CONDDETR_FOR_STORED(p.stored, apply_to, p, begin, end); }

}  // namespace conddetr::dropout::CONDDETR_LEVEL
