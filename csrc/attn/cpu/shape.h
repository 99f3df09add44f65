// Sizes of attention's packed operands on the CPU, and their memory.
//
// This file and those that include it are part of kernels.cpp, which is compiled once for each instruction set.
#pragma once

#include "attn/kernels.h"

#include "common/product.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

// Adjacent channels of the left factor, which are summed in one go; wider heads take several rounds.
#if defined(__FMA__)
constexpr int kDepth = 32;
#else
constexpr int kDepth = 16;  // twice the roundings
#endif
// Scores of one query in a tile, with room for a vector that starts at the last of them.
constexpr int kStride = kTileKeys + kLanes<float>;
constexpr int kAlign = 64;

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Allocates pieces of one block of memory; with null, it only counts bytes.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <typename Real>
  Real* take(int64_t count) {
    Real* piece = base_ ? reinterpret_cast<Real*>(base_ + used_) : nullptr;
    used_ += size_t(round_up(count * int64_t(sizeof(Real)), kAlign));
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

template <typename T>
const T* at(const Tensor4& tensor, int64_t image, int64_t head) {
  return static_cast<const T*>(tensor.data) + image * tensor.image + head * tensor.head;
}

inline int64_t query_index(const Problem& p, int64_t image, int64_t head, int64_t query) {
  return (image * p.heads + head) * p.queries + query;
}

// Sizes of packed operands.
template <typename Real>
struct Shape {
  explicit Shape(const Problem& p)
      : depth(p.is_separable() ? p.d : p.d + p.ds),
        content(round_up(depth, kPanel<Real>)),
        spatial(round_up(p.ds, kPanel<Real>)),
        values(round_up(p.dv, kPanel<Real>)),
        width(p.is_separable() ? round_up(p.width, kPanel<Real>) + kLanes<Real> : 0),
        height(round_up(p.height, kPanel<Real>)),
        rows(kLanes<Real> + (p.is_separable() ? p.width : kLanes<Real>)),
        start(round_up(rows + p.height, kPanel<Real>) + 2 * kLanes<Real>) {}
  int64_t depth;                     // of the product of queries and keys
  int64_t content, spatial, values;  // channels, whole panels
  int64_t width, height;             // of the grid, whole panels, and a vector that starts at the last column
  // Where scores of one query start: a vector for keys past the last one, columns of the grid, its rows; and room for
  // whole panels and for a vector that starts at the last column. Dense keys: a vector of zeros, one row.
  int64_t rows, start;  // the first row, length
};

int64_t left_size(int64_t depth) { return round_up(depth, kDepth) * kRows; }

void fill(void* to, size_t bytes) { memset(to, 0, bytes); }

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
