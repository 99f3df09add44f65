// Forward: scores of kRows queries × one tile, weights, values.
#pragma once

#include "attn/cpu/operands.h"
#include "attn/cpu/scores.h"
#include "attn/cpu/softmax.h"
#include "common/softmax.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

template <typename T, bool kDrops>
struct Forward {
  using Real = Compute<T>;

  Forward(const Problem& p_, const Result& r_, const Task& task_)
      : p(p_), r(r_), task(task_), shape(p_), blocks((task.end - task.begin + kRows - 1) / kRows) {
    Arena counting(nullptr);
    lay_out(counting);
    Arena arena(scratch(counting.used()));
    lay_out(arena);
  }

  void lay_out(Arena& arena) {
    running = arena.take<Running<Real>>(blocks);
    left = arena.take<Real>(blocks * left_size(shape.depth));
    starts = arena.take<Real>(blocks * kRows * shape.start);
    sums = arena.take<Real>(blocks * kRows * shape.values);
    grid = arena.take<Real>(grid_size<Real>(p));
    spatial_left = arena.take<Real>(left_size(p.ds));
    keys = arena.take<Real>(kTileKeys * shape.depth);
    values = arena.take<Real>(kTileKeys * shape.values);
    scores = arena.take<Real>(kRows * kStride);
    pieces = arena.take<Pieces<Real>>(1);
    positions = arena.take<int32_t>(kTileKeys + p.width + p.height);
  }

  Real* start(int64_t block) const { return starts + block * kRows * shape.start; }

  void run() {
    fill(sums, size_t(blocks * kRows * shape.values) * sizeof(Real));
    fill(values, size_t(kTileKeys * shape.values) * sizeof(Real));
    pack_grid<T>(p, task.image, task.head, grid, positions);
    for (int64_t block = 0; block < blocks; ++block) {
      running[block] = {};
      pack_queries<T>(p, shape, task.image, task.head, first_query(block), count(block), grid,
                      left + block * left_size(shape.depth), spatial_left, start(block));
    }
    const Keys& visited = p.visited[task.image];
    for (int64_t t = 0; t < visited.count; ++t) {
      const Tile& tile = visited.tiles[t];
      tile_positions(p, visited, tile, positions);
      pack_keys<T>(p, shape, task.image, task.head, tile, positions, keys);
      pack_straight<T>(values, kTileKeys, at<T>(p.v, task.image, task.head), p.v.item, positions, tile.keys, 0, p.dv,
                       Real(1));
      pieces->find(p, shape, visited, tile);
      for (int64_t block = 0; block < blocks; ++block) visit(visited, tile, block, t == 0);
    }
    for (int64_t block = 0; block < blocks; ++block) write(block);
  }

  int64_t first_query(int64_t block) const { return task.begin + block * kRows; }
  int64_t count(int64_t block) const {
    const int64_t left_over = task.end - first_query(block);
    return left_over < kRows ? left_over : kRows;
  }

  // Adds one tile of keys to the output of one block of queries: scores, weights, values.
  void visit(const Keys& visited, const Tile& tile, int64_t block, bool is_first) {
    Running<Real>& state = running[block];
    Real* block_sums = sums + block * kRows * shape.values;
    const Real* block_left = left + block * left_size(shape.depth);
    make_scores<Real>(tile, *pieces, shape, start(block), block_left, keys, scores);
    if (is_first) raise_reference<Real>(scores, tile.keys, state, shape, p.height, start(block), block_sums, true);
    Kept kept;
    if (kDrops) find_kept(p, visited, tile, task, first_query(block), count(block), kept);
    const Running<Real> before = state;
    if (make_weights<kDrops>(scores, tile.keys, kept, state.total) > Real(1 << 30)) {
      state = before;
      make_scores<Real>(tile, *pieces, shape, start(block), block_left, keys, scores);
      raise_reference<Real>(scores, tile.keys, state, shape, p.height, start(block), block_sums, false);
      make_weights<kDrops>(scores, tile.keys, kept, state.total);
    }
    for (int64_t panel = 0; panel * kPanel<Real> < shape.values; ++panel) {
      product<kStride, 1>(tile.keys, scores, values + panel * kTileKeys * kPanel<Real>,
                          block_sums + panel * kRows * kPanel<Real>, kPanel<Real>);
    }
  }

  void write(int64_t block) {
    const Real* block_sums = sums + block * kRows * shape.values;
    for (int64_t m = 0; m < count(block); ++m) {
      const int64_t query = first_query(block) + m;
      const Real total = sum_of<Real>(running[block].total[m]);
      const Real factor = inverse_total(total) * Real(1 / (1 - p.dropout_p));
      T* out = static_cast<T*>(r.out) + ((task.image * p.queries + query) * p.heads + task.head) * p.dv;
      unpack_row(out, block_sums + m * kPanel<Real>, kRows * kPanel<Real>, 0, p.dv, factor);
      static_cast<Real*>(r.lse)[query_index(p, task.image, task.head, query)] =
          log_sum_exp2(running[block].reference[m], total);
    }
  }

  const Problem& p;
  const Result& r;
  const Task& task;
  const Shape<Real> shape;
  const int64_t blocks;
  Running<Real>* running;
  Real *left, *starts, *sums, *grid, *spatial_left, *keys, *values, *scores;
  Pieces<Real>* pieces;
  int32_t* positions;
};

}  // namespace
}  // namespace conddetr::attn::CONDDETR_LEVEL
