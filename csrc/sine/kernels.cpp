// Sine embedding and λ ⊙ p_s, forward and backward, in one pass over memory. Compiled once for each instruction set:
// the inner loops are written so that the compiler vectorises them.

#include "sine/kernels.h"

#include "common/sincos.h"

namespace conddetr::sine::CONDDETR_LEVEL {
namespace {

// Channels of one coordinate at a time: this many fit the first-level cache for any `dim`.
constexpr int64_t kChunk = 256;

// Halves of rows, one for each coordinate, whose slopes are summed at a time.
constexpr int64_t kHalves = 64;

// Values of a chunk's channels that all rows share, in the compute type.
template <typename Real>
struct Chunk {
  Chunk(const Problem& p, int64_t first_) : first(first_) {
    const int64_t left = p.dim / 2 - first;
    count = left < kChunk ? left : kChunk;
    for (int64_t i = 0; i < count; ++i) {
      rate[i] = Real(p.rates[first + i]);
      slope[i] = Real(p.rates[first + i] * 6.283185307179586);
      // The cosine of the odd channels is a sine a quarter turn ahead.
      start[i] = i % 2 ? Real(0.25) : Real(0);
    }
  }

  int64_t first, count;
  Real rate[kChunk], slope[kChunk], start[kChunk];
};

template <typename T>
void forward_rows(const Problem& p, void* out_, int64_t begin, int64_t end) {
  using Real = Compute<T>;
  const T* points = static_cast<const T*>(p.points);
  const T* transform = static_cast<const T*>(p.transform);
  T* out = static_cast<T*>(out_);
  const int64_t half = p.dim / 2;
  for (int64_t first = 0; first < half; first += kChunk) {
    const Chunk<Real> c(p, first);
    for (int64_t row = 2 * begin; row < 2 * end; ++row) {
      // y's half first: halves of rows alternate with the coordinates.
      const Real coordinate = load(points[row ^ 1]);
      const int64_t offset = row * half + first;
      Real value[kChunk];
      for (int64_t i = 0; i < c.count; ++i) value[i] = sin_turns(coordinate * c.rate[i] + c.start[i]);
      if (transform) {
        for (int64_t i = 0; i < c.count; ++i) value[i] *= load(transform[offset + i]);
      }
      for (int64_t i = 0; i < c.count; ++i) store(out[offset + i], value[i]);
    }
  }
}

template <typename T>
void backward_rows(const Problem& p, const Gradients& g, int64_t begin, int64_t end) {
  using Real = Compute<T>;
  const T* points = static_cast<const T*>(p.points);
  const T* transform = static_cast<const T*>(p.transform);
  const T* upstream = static_cast<const T*>(g.upstream);
  T *grad_points = static_cast<T*>(g.points), *grad_transform = static_cast<T*>(g.transform);
  const int64_t half = p.dim / 2;
  for (int64_t group = 2 * begin; group < 2 * end; group += kHalves) {
    const int64_t stop = 2 * end - group < kHalves ? 2 * end : group + kHalves;
    Real totals[kHalves] = {};
    for (int64_t first = 0; first < half; first += kChunk) {
      const Chunk<Real> c(p, first);
      for (int64_t row = group; row < stop; ++row) {
        const Real coordinate = load(points[row ^ 1]);
        const int64_t offset = row * half + first;
        Real slope[kChunk];
        for (int64_t i = 0; i < c.count; ++i) {
          slope[i] =
              load(upstream[offset + i]) * sin_turns(coordinate * c.rate[i] + c.start[i] + Real(0.25)) * c.slope[i];
        }
        if (transform) {
          for (int64_t i = 0; i < c.count; ++i) {
            slope[i] *= load(transform[offset + i]);
            store(grad_transform[offset + i],
                  load(upstream[offset + i]) * sin_turns(coordinate * c.rate[i] + c.start[i]));
          }
        }
        for (int64_t i = 0; i < c.count; ++i) totals[row - group] += slope[i];
      }
    }
    for (int64_t row = group; row < stop; ++row) store(grad_points[row ^ 1], totals[row - group]);
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
