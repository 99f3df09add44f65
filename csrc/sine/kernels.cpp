// Sine embedding and λ ⊙ p_s, forward and backward, in one pass over memory. Compiled once for each instruction set:
// the inner loops are written so that the compiler makes vector code of them.

#include "sine/kernels.h"

#include "common/sincos.h"

namespace conddetr::sine::CONDDETR_LEVEL {
namespace {

// Channels of one coordinate at a time: this many fit the first-level cache whatever `dim` is.
constexpr int64_t kChunk = 256;

// The cosine of the odd channels is a sine a quarter turn ahead.
template <typename Real>
inline Real turns(Real coordinate, double rate, int64_t channel) {
  return coordinate * Real(rate) + (channel % 2 ? Real(0.25) : Real(0));
}

template <typename T>
void forward_rows(const Problem& p, void* out_, int64_t begin, int64_t end) {
  using Real = Compute<T>;
  const T* points = static_cast<const T*>(p.points);
  const T* transform = static_cast<const T*>(p.transform);
  T* out = static_cast<T*>(out_);
  const int64_t half = p.dim / 2;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t part = 0; part < 2; ++part) {  // y's half first
      const Real coordinate = load(points[2 * row + 1 - part]);
      const int64_t offset = row * p.dim + part * half;
      for (int64_t first = 0; first < half; first += kChunk) {
        const int64_t count = half - first < kChunk ? half - first : kChunk;
        Real value[kChunk];
        for (int64_t i = 0; i < count; ++i) value[i] = sin_turns(turns(coordinate, p.rates[first + i], i));
        if (transform) {
          for (int64_t i = 0; i < count; ++i) value[i] *= load(transform[offset + first + i]);
        }
        for (int64_t i = 0; i < count; ++i) store(out[offset + first + i], value[i]);
      }
    }
  }
}

template <typename T>
void backward_rows(const Problem& p, const Gradients& g, int64_t begin, int64_t end) {
  using Real = Compute<T>;
  const T* points = static_cast<const T*>(p.points);
  const T* transform = static_cast<const T*>(p.transform);
  const T* upstream = static_cast<const T*>(g.upstream);
  T* grad_transform = static_cast<T*>(g.transform);
  const int64_t half = p.dim / 2;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t part = 0; part < 2; ++part) {
      const Real coordinate = load(points[2 * row + 1 - part]);
      const int64_t offset = row * p.dim + part * half;
      Real total = 0;
      for (int64_t first = 0; first < half; first += kChunk) {
        const int64_t count = half - first < kChunk ? half - first : kChunk;
        Real slope[kChunk];
        for (int64_t i = 0; i < count; ++i) {
          const double rate = p.rates[first + i];
          slope[i] = load(upstream[offset + first + i]) * sin_turns(turns(coordinate, rate, i) + Real(0.25)) *
                     Real(rate * 6.283185307179586);
        }
        if (transform) {
          for (int64_t i = 0; i < count; ++i) {
            slope[i] *= load(transform[offset + first + i]);
            store(grad_transform[offset + first + i],
                  load(upstream[offset + first + i]) * sin_turns(turns(coordinate, p.rates[first + i], i)));
          }
        }
        for (int64_t i = 0; i < count; ++i) total += slope[i];
      }
      store(static_cast<T*>(g.points)[2 * row + 1 - part], total);
    }
  }
}

}  // namespace

void forward(const Problem& p, void* out, int64_t begin, int64_t end) {
  CONDDETR_FOR_STORED(p.stored, forward_rows, p, out, begin, end);
}

void backward(const Problem& p, const Gradients& g, int64_t begin, int64_t end) {
  CONDDETR_FOR_STORED(p.stored, backward_rows, p, g, begin, end);
}

}  // namespace conddetr::sine::CONDDETR_LEVEL
