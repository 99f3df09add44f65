// Backward: kBlockQueries queries × one tile at a time. With P the weights after dropout and dS the gradient of the
// scores: dq_c = dS·K, dk_c = dSᵀ·q_c, dv = Pᵀ·dO. The spatial parts need only the sums of dS over rows and columns of
// the grid (`finish.h`), so no gradient of a dense spatial key is computed.
#pragma once

#include "attn/cpu/backward_operands.h"
#include "attn/cpu/keep.h"
#include "attn/cpu/partial.h"
#include "attn/cpu/scores.h"
#include "common/exp2.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

template <typename T, bool kDrops>
struct Backward {
  using Real = Compute<T>;
  static constexpr int L = kLanes<Real>, P = kPanel<Real>;

  Backward(const Problem& p_, const Upstream& u, const Gradients& g_, const Task& task_, void* partial)
      : p(p_),
        g(g_),
        task(task_),
        shape(p_),
        arena(static_cast<char*>(partial)),
        sums(p_, shape, arena),
        operands(p_, u, task_, shape, sums.queries) {
    fill(partial, arena.used());
    Arena counting(nullptr);
    lay_out(counting);
    Arena memory(scratch(counting.used()));
    lay_out(memory);
  }

  void lay_out(Arena& memory) {
    operands.lay_out(memory);
    weights = memory.take<Real>(kBlockQueries * kStride);
    slopes = memory.take<Real>(kBlockQueries * kStride);
    key_sums = memory.take<Real>(kTileKeys * shape.content);
    value_sums = memory.take<Real>(kTileKeys * shape.values);
    pieces = memory.take<Pieces<Real>>(1);
  }

  void run() {
    operands.pack_head();
    const Keys& visited = p.visited[task.image];
    for (int64_t t = task.begin; t < task.end; ++t) {
      const Tile& tile = visited.tiles[t];
      operands.pack_tile(visited, tile);
      pieces->find(p, shape, visited, tile);
      fill(key_sums, size_t(kTileKeys * shape.content) * sizeof(Real));
      fill(value_sums, size_t(kTileKeys * shape.values) * sizeof(Real));
      for (int64_t first = 0; first < operands.blocks; first += kBlockQueries / kRows) visit(visited, tile, first);
      write(tile);
    }
  }

  // kBlockQueries queries, from block `first` on, and one tile of keys.
  void visit(const Keys& visited, const Tile& tile, int64_t first) {
    for (int64_t i = 0; i < kBlockQueries / kRows; ++i) {
      const int64_t block = first + i;
      Real *weight = weights + i * kRows * kStride, *slope = slopes + i * kRows * kStride;
      differentiate(visited, tile, block, weight, slope);
      for (int64_t panel = 0; panel * P < shape.content; ++panel) {
        product<kStride, 1>(tile.keys, slope, operands.keys + panel * kTileKeys * P,
                            sums.content + (block * shape.content / P + panel) * kRows * P, P);
      }
    }
    if (p.is_separable()) add_rows_and_columns(visited, tile, first * kRows);
    accumulate(tile, slopes, operands.queries + first * kRows * P, shape.content, key_sums);
    accumulate(tile, weights, operands.upstream + first * kRows * P, shape.values, value_sums);
  }

  // Weights and slopes (dS before `scale`) of kRows queries; weights before their factor, see `pack_row`.
  void differentiate(const Keys& visited, const Tile& tile, int64_t block, Real* weight, Real* slope) {
    const Real* left = operands.left + block * left_size(shape.depth);
    const Real* upstream_left = operands.upstream_left + block * left_size(p.dv);
    make_scores<Real>(tile, *pieces, shape, operands.start(block), left, operands.keys_transposed, weight);
    multiply<false>(upstream_left, operands.values_transposed, p.dv, tile.keys, slope, P, kStride);
    Kept kept;
    if (kDrops) find_kept(p, visited, tile, task, block * kRows, operands.count(block), kept);
    for (int m = 0; m < kRows; ++m) {
      Real *w = weight + m * kStride, *s = slope + m * kStride;
      const Vector<Real> less = broadcast(operands.delta[block * kRows + m]);
      Integers<Real> bits = {};
      for (int i = 0; i < tile.keys; i += L) {
        const Vector<Real> value = exp2<Real>(load_vector(w + i)), slope = load_vector(s + i);
        if (kDrops) bits = i % kWord == 0 ? spread<Real>(kept.words[i / kWord][m]) : bits >> L;
        store_vector(w + i, kDrops ? keep<Real>(value, bits) : value);
        store_vector(s + i, value * ((kDrops ? keep<Real>(slope, bits) : slope) - less));
      }
      // Zeros past the last key: those sums stay zero.
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
      const int64_t row = (task.image * p.keys + operands.positions[key]) * p.heads + task.head;
      unpack_row(static_cast<T*>(g.k_content) + row * p.d, key_sums + key * P, kTileKeys * P, 0, p.d, Real(1));
      if (!p.is_separable()) {
        unpack_row(static_cast<T*>(g.spatial) + row * p.ds, key_sums + key * P, kTileKeys * P, p.d, p.ds, Real(1));
      }
      unpack_row(static_cast<T*>(g.v) + row * p.dv, value_sums + key * P, kTileKeys * P, 0, p.dv, Real(1));
    }
  }

  const Problem& p;
  const Gradients& g;
  const Task& task;
  const Shape<Real> shape;
  Arena arena;
  const Partial<Real> sums;
  BackwardOperands<T> operands;
  Real *weights, *slopes, *key_sums, *value_sums;
  Pieces<Real>* pieces;
};

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
