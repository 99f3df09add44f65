// The last step of backward, after all tiles of one head of one image: it adds the parts, always in the same order, and
// computes the gradients of both queries, of R and of C from them.
#pragma once

#include "attn/cpu/pack.h"
#include "attn/cpu/partial.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

template <typename T>
struct Finish {
  using Real = Compute<T>;
  static constexpr int P = kPanel<Real>;

  Finish(const Problem& p_, const Gradients& g_, int64_t image_, int64_t head_)
      : p(p_), g(g_), image(image_), head(head_), shape(p_) {}

  void run(char* partials, int64_t count) {
    Arena first_arena(partials);
    const Partial<Real> sums(p, shape, first_arena);
    for (int64_t part = 1; part < count; ++part) {
      Real *to = reinterpret_cast<Real*>(partials),
           *from = reinterpret_cast<Real*>(partials + part * first_arena.used());
      for (size_t i = 0; i < first_arena.used() / sizeof(Real); ++i) to[i] += from[i];
    }
    for (int64_t query = 0; query < p.queries; ++query) {
      const int64_t row = (image * p.queries + query) * p.heads + head;
      const Real* from = sums.content + (query / kRows * shape.content / P * kRows + query % kRows) * P;
      unpack_row(static_cast<T*>(g.q_content) + row * p.d, from, kRows * P, 0, p.d, Real(p.scale));
      if (!p.is_separable()) {
        unpack_row(static_cast<T*>(g.q_spatial) + row * p.ds, from, kRows * P, p.d, p.ds, Real(p.scale));
      }
    }
    if (!p.is_separable()) return;
    Arena counting(nullptr);
    lay_out(counting);
    Arena memory(scratch(counting.used()));
    lay_out(memory);
    pack();
    query_gradient(sums);
    grid_gradient(sums.rows, shape.height, p.height, g.spatial);
    grid_gradient(sums.columns, shape.width, p.width, g.columns);
  }

  void lay_out(Arena& memory) {
    const int64_t longest = p.queries > p.width + p.height ? p.queries : p.width + p.height;
    positions = memory.take<int32_t>(longest);
    rows = memory.take<Real>(p.height * shape.spatial);
    columns = memory.take<Real>(p.width * shape.spatial);
    queries = memory.take<Real>(p.queries * shape.spatial);
    left = memory.take<Real>(left_size(longest));
    out = memory.take<Real>(kRows * shape.spatial);
    transposed = memory.take<Real>(kRows * p.queries);
  }

  void pack() {
    fill(rows, size_t(p.height * shape.spatial) * sizeof(Real));
    fill(columns, size_t(p.width * shape.spatial) * sizeof(Real));
    fill(queries, size_t(p.queries * shape.spatial) * sizeof(Real));
    for (int64_t i = 0; i < p.queries || i < p.width + p.height; ++i) positions[i] = int32_t(i);
    const Real scale = Real(p.scale);
    pack_straight(rows, p.height, at<T>(p.spatial, image, head), p.spatial.item, positions, p.height, 0, p.ds, scale);
    pack_straight(columns, p.width, at<T>(p.columns, image, head), p.columns.item, positions, p.width, 0, p.ds, scale);
    pack_straight(queries, p.queries, at<T>(p.q_spatial, image, head), p.q_spatial.item, positions, p.queries, 0, p.ds,
                  scale);
  }

  // dq_s = dS_y·R + dS_x·C
  void query_gradient(const Partial<Real>& sums) {
    for (int64_t query = 0; query < p.queries; query += kRows) {
      const int64_t count = p.queries - query < kRows ? p.queries - query : kRows;
      fill(out, size_t(kRows * shape.spatial) * sizeof(Real));
      pack_left(left, sums.rows + query * shape.height, shape.height, count, 0, p.height, Real(1));
      multiply(left, rows, p.height, p.ds, out, kRows * P, P);
      pack_left(left, sums.columns + query * shape.width, shape.width, count, 0, p.width, Real(1));
      multiply(left, columns, p.width, p.ds, out, kRows * P, P);
      write(static_cast<T*>(g.q_spatial) + ((image * p.queries + query) * p.heads + head) * p.ds, count);
    }
  }

  // dR = dS_yᵀ·q_s, and dC = dS_xᵀ·q_s
  void grid_gradient(const Real* slopes, int64_t stride, int64_t items, void* gradient) {
    for (int64_t item = 0; item < items; item += kRows) {
      const int64_t count = items - item < kRows ? items - item : kRows;
      for (int64_t query = 0; query < p.queries; ++query) {
        for (int64_t m = 0; m < count; ++m) transposed[m * p.queries + query] = slopes[query * stride + item + m];
      }
      fill(out, size_t(kRows * shape.spatial) * sizeof(Real));
      pack_left(left, transposed, p.queries, count, 0, p.queries, Real(1));
      multiply(left, queries, p.queries, p.ds, out, kRows * P, P);
      write(static_cast<T*>(gradient) + ((image * items + item) * p.heads + head) * p.ds, count);
    }
  }

  void write(T* to, int64_t count) {
    for (int64_t m = 0; m < count; ++m) unpack_row(to + m * p.heads * p.ds, out + m * P, kRows * P, 0, p.ds, Real(1));
  }

  const Problem& p;
  const Gradients& g;
  const int64_t image, head;
  const Shape<Real> shape;
  int32_t* positions;
  Real *rows, *columns, *queries, *left, *out, *transposed;
};

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
