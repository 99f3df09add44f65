// Backward: kBlockQueries queries × one tile at a time. With P the weights after dropout and dS the gradient of the
// scores: dq_c = dS·K, dk_c = dSᵀ·q_c, dv = Pᵀ·dO. Sums of dS over rows and columns of the grid are all that the
// spatial parts need (`finish.h`), so that no gradient of a dense spatial key is ever made.
#pragma once

#include <math.h>

#include "attn/cpu/keep.h"
#include "attn/cpu/partial.h"
#include "attn/cpu/scores.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

// Log-sum-exps between -kModerate and kModerate are of moderate size: no power of two is too large or too small then.
constexpr int kModerate = 24;

template <typename T, bool kDrops>
struct Backward {
  using Real = Compute<T>;
  static constexpr int L = kLanes<Real>, P = kPanel<Real>;

  Backward(const Problem& p_, const Upstream& u_, const Gradients& g_, const Task& task_, void* partial_)
      : p(p_), u(u_), g(g_), task(task_), shape(p_), arena(static_cast<char*>(partial_)), sums(p_, shape, arena),
        blocks(sums.queries / kRows) {
    fill(partial_, arena.used());
    Arena counting(nullptr);
    lay_out(counting);
    Arena memory(scratch(counting.used()));
    lay_out(memory);
  }

  void lay_out(Arena& memory) {
    left = memory.take<Real>(blocks * left_size(shape.depth));
    upstream_left = memory.take<Real>(blocks * left_size(p.dv));
    queries = memory.take<Real>(sums.queries * shape.content);
    upstream = memory.take<Real>(sums.queries * shape.values);
    scaled = memory.take<Real>(sums.queries * p.dv);
    delta = memory.take<Real>(sums.queries);
    starts = memory.take<Real>(blocks * kRows * shape.start);
    grid = memory.take<Real>(grid_size<Real>(p));
    spatial_left = memory.take<Real>(left_size(p.ds));
    keys_transposed = memory.take<Real>(kTileKeys * shape.depth);
    values_transposed = memory.take<Real>(kTileKeys * p.dv);
    keys = memory.take<Real>(kTileKeys * shape.content);
    weights = memory.take<Real>(kBlockQueries * kStride);
    slopes = memory.take<Real>(kBlockQueries * kStride);
    key_sums = memory.take<Real>(kTileKeys * shape.content);
    value_sums = memory.take<Real>(kTileKeys * shape.values);
    pieces = memory.take<Pieces<Real>>(1);
    positions = memory.take<int32_t>(kTileKeys + p.width + p.height + sums.queries);
  }

  Real* start(int64_t block) const { return starts + block * kRows * shape.start; }
  int64_t count(int64_t block) const {
    const int64_t left_over = p.queries - block * kRows;
    return left_over < 0 ? 0 : (left_over < kRows ? left_over : kRows);
  }
  const T* row_of(const void* tensor, int64_t query) const {
    return static_cast<const T*>(tensor) + ((task.image * p.queries + query) * p.heads + task.head) * p.dv;
  }

  void run() {
    pack();
    const Keys& visited = p.visited[task.image];
    for (int64_t t = task.begin; t < task.end; ++t) {
      const Tile& tile = visited.tiles[t];
      tile_positions(p, visited, tile, positions);
      pieces->find(p, shape, visited, tile);
      pack_tile(tile);
      for (int64_t first = 0; first < blocks; first += kBlockQueries / kRows) visit(visited, tile, first);
      write(tile);
    }
  }

  void pack() {
    pack_grid<T>(p, task.image, task.head, grid, positions);
    fill(queries, size_t(sums.queries * shape.content) * sizeof(Real));
    fill(upstream, size_t(sums.queries * shape.values) * sizeof(Real));
    fill(keys, size_t(kTileKeys * shape.content) * sizeof(Real));
    for (int64_t i = 0; i < p.queries; ++i) positions[i] = int32_t(i);
    const T* q_content = at<T>(p.q_content, task.image, task.head);
    const T* q_spatial = at<T>(p.q_spatial, task.image, task.head);
    pack_straight(queries, sums.queries, q_content, p.q_content.item, positions, p.queries, 0, p.d, Real(p.scale));
    if (!p.is_separable()) {
      pack_straight(queries, sums.queries, q_spatial, p.q_spatial.item, positions, p.queries, p.d, p.ds, Real(p.scale));
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t query = block * kRows;
      pack_queries<T>(p, shape, task.image, task.head, query, count(block), grid,
                      left + block * left_size(shape.depth), spatial_left, start(block));
      for (int64_t m = 0; m < kRows; ++m) pack_row(block, m);
      pack_left(upstream_left + block * left_size(p.dv), scaled + query * p.dv, p.dv, count(block), 0, p.dv, Real(1));
    }
    pack_straight(upstream, sums.queries, scaled, p.dv, positions, p.queries, 0, p.dv, Real(1));
  }

  // A query's weight is 2^(score - shift) · factor, with factor = 2^(shift - lse). Where the scores are of moderate size
  // there is no shift, so that they are rounded once less and as the small numbers that they are. The factor goes to
  // dO, and delta = dO·O with it; that of weights that dropout keeps goes to dO alone.
  void pack_row(int64_t block, int64_t m) {
    const int64_t query = block * kRows + m;
    Real factor = 0, total = 0;
    if (m < count(block)) {
      const Real lse = static_cast<const Real*>(u.lse)[query_index(p, task.image, task.head, query)];
      const bool is_seen = lse != Real(INFINITY);  // it has a key
      const Real shift = !is_seen || (lse > -kModerate && lse < kModerate) ? Real(0) : ::round(lse);
      if (is_seen) factor = ::exp2(shift - lse);
      Real* rows = start(block) + m * shape.start + shape.rows;
      for (int64_t y = 0; shift != 0 && y < p.height; ++y) rows[y] -= shift;
      scale(scaled + query * p.dv, row_of(u.grad, query), p.dv, factor * Real(1 / (1 - p.dropout_p)));
      total = dot(row_of(u.grad, query), row_of(u.out, query), p.dv) * factor;
    }
    delta[query] = total;
  }

  void pack_tile(const Tile& tile) {
    const int64_t n = tile.keys;
    pack_keys<T>(p, shape, task.image, task.head, tile, positions, keys_transposed);
    pack_transposed(values_transposed, p.dv, at<T>(p.v, task.image, task.head), p.v.item, positions, n, p.dv);
    pack_straight(keys, kTileKeys, at<T>(p.k_content, task.image, task.head), p.k_content.item, positions, n, 0, p.d,
                  Real(1));
    if (!p.is_separable()) {
      pack_straight(keys, kTileKeys, at<T>(p.spatial, task.image, task.head), p.spatial.item, positions, n, p.d, p.ds,
                    Real(1));
    }
    fill(key_sums, size_t(kTileKeys * shape.content) * sizeof(Real));
    fill(value_sums, size_t(kTileKeys * shape.values) * sizeof(Real));
  }

  // kBlockQueries queries, from block `first` on, and one tile of keys.
  void visit(const Keys& visited, const Tile& tile, int64_t first) {
    for (int64_t i = 0; i < kBlockQueries / kRows; ++i) {
      const int64_t block = first + i;
      Real *weight = weights + i * kRows * kStride, *slope = slopes + i * kRows * kStride;
      differentiate(visited, tile, block, weight, slope);
      for (int64_t panel = 0; panel * P < shape.content; ++panel) {
        product<kStride, 1>(tile.keys, slope, keys + panel * kTileKeys * P,
                            sums.content + (block * shape.content / P + panel) * kRows * P, P);
      }
    }
    if (p.is_separable()) add_rows_and_columns(visited, tile, first * kRows);
    accumulate(tile, slopes, queries + first * kRows * P, shape.content, key_sums);
    accumulate(tile, weights, upstream + first * kRows * P, shape.values, value_sums);
  }

  // Weights and slopes (dS before `scale`) of kRows queries; weights before their factor, see `pack_row`.
  void differentiate(const Keys& visited, const Tile& tile, int64_t block, Real* weight, Real* slope) {
    const Real* block_left = left + block * left_size(shape.depth);
    make_scores<Real>(tile, *pieces, shape, start(block), block_left, keys_transposed, weight);
    multiply<false>(upstream_left + block * left_size(p.dv), values_transposed, p.dv, tile.keys, slope, P, kStride);
    Kept kept;
    if (kDrops) find_kept(p, visited, tile, task, block * kRows, count(block), kept);
    for (int m = 0; m < kRows; ++m) {
      Real *w = weight + m * kStride, *s = slope + m * kStride;
      const Vector<Real> less = broadcast(delta[block * kRows + m]);
      Integers<Real> bits = {};
      for (int i = 0; i < tile.keys; i += L) {
        const Vector<Real> value = exp2<Real>(load_vector(w + i)), slope = load_vector(s + i);
        if (kDrops) bits = i % kWord == 0 ? spread<Real>(kept.words[i / kWord][m]) : bits >> L;
        store_vector(w + i, kDrops ? keep<Real>(value, bits) : value);
        store_vector(s + i, value * ((kDrops ? keep<Real>(slope, bits) : slope) - less));
      }
      // Nothing but zeros for keys that are not there: their sums stay zero.
      for (int i = tile.keys; i < kTileKeys; ++i) w[i] = s[i] = 0;
    }
  }

  // [keys][channels] += leftᵀ × panels, over kBlockQueries queries.
  void accumulate(const Tile& tile, const Real* left_rows, const Real* panels, int64_t channels, Real* to) {
    for (int64_t panel = 0; panel * P < channels; ++panel) {
      for (int key = 0; key < tile.keys; key += kRows) {
        product<1, kStride>(kBlockQueries, left_rows + key, panels + panel * sums.queries * P,
                            to + (panel * kTileKeys + key) * P, P);
      }
    }
  }

  void add_rows_and_columns(const Keys& visited, const Tile& tile, int64_t query) {
    for (int r = 0; r < tile.runs; ++r) {
      const Run& run = visited.runs[tile.first_run + r];
      for (int64_t m = 0; m < kBlockQueries; ++m) {
        const Real* from = slopes + m * kStride + run.offset;
        Real* to = sums.columns + (query + m) * shape.width + run.column;
        Vector<Real> total = {};
        int i = 0;
        for (; i + L <= run.length; i += L) {
          const Vector<Real> value = load_vector(from + i);
          total += value;
          store_vector(to + i, load_vector(to + i) + value);
        }
        if (i < run.length) {
          const Vector<Real> value = first_lanes<Real>(load_vector(from + i), run.length - i);
          total += value;
          store_vector(to + i, load_vector(to + i) + value);
        }
        sums.rows[(query + m) * shape.height + run.row] += sum_of<Real>(total);
      }
    }
  }

  void write(const Tile& tile) {
    for (int key = 0; key < tile.keys; ++key) {
      const int64_t row = (task.image * p.keys + positions[key]) * p.heads + task.head;
      unpack_row(static_cast<T*>(g.k_content) + row * p.d, key_sums + key * P, kTileKeys * P, 0, p.d, Real(1));
      if (!p.is_separable()) {
        unpack_row(static_cast<T*>(g.spatial) + row * p.ds, key_sums + key * P, kTileKeys * P, p.d, p.ds, Real(1));
      }
      unpack_row(static_cast<T*>(g.v) + row * p.dv, value_sums + key * P, kTileKeys * P, 0, p.dv, Real(1));
    }
  }

  const Problem& p;
  const Upstream& u;
  const Gradients& g;
  const Task& task;
  const Shape<Real> shape;
  Arena arena;
  const Partial<Real> sums;
  const int64_t blocks;
  Real *left, *upstream_left, *queries, *upstream, *scaled, *delta, *starts, *grid, *spatial_left;
  Real *keys_transposed, *values_transposed, *keys, *weights, *slopes, *key_sums, *value_sums;
  Pieces<Real>* pieces;
  int32_t* positions;
};

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
