// Conditional attention on the CPU. Compiled once for each instruction set.
//
// Keys are those of the valid rectangle (or those that the mask leaves), packed tile by tile; no score of padding is
// ever computed. With separable spatial keys the score is q_c·k_c[y, x] + q_s·R[y] + q_s·C[x]: the products with R and C
// are made once per query, so that only the content product depends on the key.
//
// Forward: scores of kRows queries × one tile, weights, values, with a running reference in place of the maximum: it is
// the maximum of the first tile, and follows only if a later weight outgrows it by 2^30. Scores are in base 2.

#include "attn/kernels.h"

#include "common/philox_simd.h"
#include "common/simd.h"
#include "common/softmax.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

// Channels of the left factor that lie side by side, and that are summed in one go; wider heads take several rounds.
#if defined(__FMA__)
constexpr int kDepth = 32;
#else
constexpr int kDepth = 16;  // twice the roundings
#endif
// Scores of one query in a tile, with room for a vector that starts at the last of them.
constexpr int kStride = kTileKeys + 4 * kLanes<float>;
constexpr int kAlign = 64;

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Hands out pieces of one stretch of memory; given null, it only counts.
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

// Sizes of packed operands.
template <typename Real>
struct Shape {
  explicit Shape(const Problem& p)
      : depth(p.is_separable() ? p.d : p.d + p.ds),
        content(round_up(depth, kPanel<Real>)),
        spatial(round_up(p.ds, kPanel<Real>)),
        values(round_up(p.dv, kPanel<Real>)),
        width(p.is_separable() ? round_up(p.width, kPanel<Real>) + 4 * kLanes<Real> : 0),
        height(round_up(p.height, kPanel<Real>)) {}
  int64_t depth;                     // of the product of queries and keys
  int64_t content, spatial, values;  // channels, whole panels
  int64_t width, height;             // of the grid, whole panels, and four vectors that start at the last column
};

int64_t left_size(int64_t depth) { return round_up(depth, kDepth) * kRows; }

// Copies channels of kRows items to a left factor, [depth / kDepth][kRows][kDepth], from channel `offset` on, times
// `factor`; zeros for items that are not there.
template <typename T>
void pack_left(Compute<T>* to, const T* from, int64_t stride, int64_t items, int64_t offset, int64_t channels,
               Compute<T> factor) {
  for (int64_t m = 0; m < kRows; ++m) {
    int64_t channel = 0;
    while (channel < channels) {
      const int64_t position = offset + channel, room = kDepth - position % kDepth;
      const int64_t count = channels - channel < room ? channels - channel : room;
      Compute<T>* target = to + position / kDepth * kDepth * kRows + m * kDepth + position % kDepth;
      const T* source = from + m * stride + channel;
      if (m < items) {
        scale(target, source, count, factor);
      } else {
        for (int64_t i = 0; i < count; ++i) target[i] = 0;
      }
      channel += count;
    }
  }
}

// Copies items, each at `positions`, to panels of items: element (channel, item) of panel i / kPanel. `to` starts at
// the first channel of the first panel; `depth` channels are between panels. Zeros for items that are not there.
template <typename T>
void pack_transposed(Compute<T>* to, int64_t depth, const T* from, int64_t stride, const int32_t* positions,
                     int64_t items, int64_t channels) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  for (int64_t first = 0; first < round_up(items, kPanel<Real>); first += L) {
    Real* panel = to + first / kPanel<Real> * depth * kPanel<Real> + first % kPanel<Real>;
    int64_t channel = 0;
    for (; channel + L <= channels; channel += L) {
      Vector<Real> square[L];
      for (int i = 0; i < L; ++i) {
        square[i] = first + i < items ? load_vector(from + positions[first + i] * stride + channel) : Vector<Real>{};
      }
      transpose<Real>(square);
      for (int i = 0; i < L; ++i) store_vector(panel + (channel + i) * kPanel<Real>, square[i]);
    }
    for (; channel < channels; ++channel) {
      for (int i = 0; i < L; ++i) {
        panel[channel * kPanel<Real> + i] =
            first + i < items ? load(from[positions[first + i] * stride + channel]) : Real(0);
      }
    }
  }
}

// Copies items to panels of channels: element (item, channel) of panel channel / kPanel, `length` items apart, times
// `factor`. Channels from `offset` on; what is not written stays as it was.
template <typename T>
void pack_straight(Compute<T>* to, int64_t length, const T* from, int64_t stride, const int32_t* positions,
                   int64_t items, int64_t offset, int64_t channels, Compute<T> factor) {
  using Real = Compute<T>;
  for (int64_t item = 0; item < items; ++item) {
    const T* source = from + positions[item] * stride;
    for (int64_t channel = 0; channel < channels;) {
      const int64_t position = offset + channel, room = kPanel<Real> - position % kPanel<Real>;
      const int64_t count = channels - channel < room ? channels - channel : room;
      Real* target = to + (position / kPanel<Real> * length + item) * kPanel<Real> + position % kPanel<Real>;
      scale(target, source + channel, count, factor);
      channel += count;
    }
  }
}

// The opposite for one item: channels from `offset` on, of panels that are `c_panel` numbers apart, times `factor`.
template <typename T>
void unpack_row(T* to, const Compute<T>* from, int64_t c_panel, int64_t offset, int64_t channels, Compute<T> factor) {
  constexpr int P = kPanel<Compute<T>>;
  for (int64_t channel = 0; channel < channels;) {
    const int64_t position = offset + channel, room = P - position % P;
    const int64_t count = channels - channel < room ? channels - channel : room;
    const Compute<T>* source = from + position / P * c_panel + position % P;
    for (int64_t i = 0; i < count; ++i) store(to[channel + i], source[i] * factor);
    channel += count;
  }
}

// C[kRows][columns] += left factor × panels, or = without kAdd; `c_panel` numbers between panels of C, `c_stride`
// between its rows.
template <bool kAdd = true, typename Real>
CONDDETR_INLINE void multiply(const Real* left, const Real* panels, int64_t depth, int64_t columns, Real* c,
                              int64_t c_panel, int64_t c_stride) {
  for (int64_t first = 0; first < depth; first += kDepth) {
    const int64_t count = depth - first < kDepth ? depth - first : kDepth;
    for (int64_t panel = 0; panel * kPanel<Real> < columns; ++panel) {
      const Real* right = panels + (panel * depth + first) * kPanel<Real>;
      if (kAdd || first > 0) {
        product<kDepth, 1>(count, left + first * kRows, right, c + panel * c_panel, c_stride);
      } else {
        product<kDepth, 1, false>(count, left + first * kRows, right, c + panel * c_panel, c_stride);
      }
    }
  }
}

void fill(void* to, size_t bytes) { memset(to, 0, bytes); }

// Where the keys of a tile lie: positions in the sequence.
void tile_positions(const Problem& p, const Keys& keys, const Tile& tile, int32_t* positions) {
  for (int r = 0; r < tile.runs; ++r) {
    const Run& run = keys.runs[tile.first_run + r];
    for (int i = 0; i < run.length; ++i) positions[run.offset + i] = int32_t(run.row * p.width) + run.column + i;
  }
}

// What scores of a block of kRows queries start from, in base 2: q_s·C[x], and q_s·R[y] less each query's reference.
// Dense keys: there is one row, and no column adds anything.
template <typename Real>
struct Start {
  Real* columns;  // [kRows][Shape::width]
  Real* rows;     // [kRows][Shape::height]
};

// Scores of a run of at most kVectors vectors. What the last one writes beyond the run, the next run writes over.
template <int kVectors, typename Real>
CONDDETR_INLINE void start_run(const Run& run, const Shape<Real>& shape, const Start<Real>& start, Real* scores) {
  constexpr int L = kLanes<Real>;
  const Real *columns = start.columns + run.column, *rows = start.rows + run.row;
  Real* target = scores + run.offset;
  for (int m = 0; m < kRows; ++m) {
    const Vector<Real> row = broadcast(*rows);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) store_vector(target + i * L, load_vector(columns + i * L) + row);
    columns += shape.width;
    rows += shape.height;
    target += kStride;
  }
}

// Scores of a block of queries and a tile of keys, before the content product is added.
template <typename Real>
void start_scores(const Problem& p, const Keys& keys, const Tile& tile, const Shape<Real>& shape,
                  const Start<Real>& start, Real* scores) {
  constexpr int L = kLanes<Real>;
  if (!p.is_separable()) {
    for (int m = 0; m < kRows; ++m) {
      const Vector<Real> row = broadcast(start.rows[m * shape.height]);
      for (int i = 0; i < tile.keys; i += L) store_vector(scores + m * kStride + i, row);
    }
  }
  for (int r = 0; p.is_separable() && r < tile.runs; ++r) {
    Run run = keys.runs[tile.first_run + r];
    for (; run.length > 4 * L; run.length -= 4 * L, run.offset += 4 * L, run.column += 4 * L) {
      start_run<4>(run, shape, start, scores);
    }
    if (run.length <= L) {
      start_run<1>(run, shape, start, scores);
    } else if (run.length <= 2 * L) {
      start_run<2>(run, shape, start, scores);
    } else if (run.length <= 3 * L) {
      start_run<3>(run, shape, start, scores);
    } else {
      start_run<4>(run, shape, start, scores);
    }
  }
  const int padded = int(round_up(tile.keys, kPanel<Real>));
  for (int m = 0; m < kRows && tile.keys < padded; ++m) {
    // Finite, so that nothing becomes NaN; as a weight it is zero, or 2^-126 times a value that is zero.
    for (int i = tile.keys; i < padded; ++i) scores[m * kStride + i] = Real(-1e30);
  }
}

// Which weights survive, for the keys of one tile.
template <typename Real>
struct Dropout {
  explicit Dropout(const Problem& p)
      : threshold(philox::threshold(float(p.dropout_p))), factor(Real(1 / (1 - p.dropout_p))) {}
  uint32_t threshold;
  Real factor;

  // kept[i] = factor or 0 for the keys of a tile, of one query.
  void fill(const Problem& p, const Keys& keys, const Tile& tile, int64_t query_index, Real* kept) const {
    uint32_t numbers[kTileKeys + 8 + 4 * kCounters];
    for (int r = 0; r < tile.runs;) {
      const Run& run = keys.runs[tile.first_run + r];
      // Rows of a rectangle follow one another: their numbers are drawn together.
      int64_t length = 0;
      for (; r < tile.runs && keys.runs[tile.first_run + r].ordinal == run.ordinal + length; ++r) {
        length += keys.runs[tile.first_run + r].length;
      }
      const int64_t skipped = run.ordinal % 4, groups = (skipped + length + 3) / 4;
      const uint64_t counter = philox::counter(query_index, p.keys, run.ordinal);
      for (int64_t g = 0; g < groups; g += kCounters) random_numbers(p.seed, counter + uint64_t(g), numbers + 4 * g);
      for (int64_t i = 0; i < length; ++i) {
        kept[run.offset + i] = (numbers[skipped + i] >> 8) >= threshold ? factor : Real(0);
      }
    }
  }
};

int64_t query_index(const Problem& p, int64_t image, int64_t head, int64_t query) {
  return (image * p.heads + head) * p.queries + query;
}

// R and C as panels, used by all queries.
template <typename T>
void pack_grid(const Problem& p, int64_t image, int64_t head, Compute<T>* columns, Compute<T>* rows,
               int32_t* positions) {
  if (!p.is_separable()) return;
  for (int64_t i = 0; i < p.width || i < p.height; ++i) positions[i] = int32_t(i);
  pack_transposed(columns, p.ds, at<T>(p.columns, image, head), p.columns.item, positions, p.width, p.ds);
  pack_transposed(rows, p.ds, at<T>(p.spatial, image, head), p.spatial.item, positions, p.height, p.ds);
}

// Packs kRows queries, scaled so that scores are in base 2, and multiplies their spatial part with R and C.
template <typename T>
void pack_queries(const Problem& p, const Shape<Compute<T>>& shape, int64_t image, int64_t head, int64_t query,
                  int64_t count, const Compute<T>* columns, const Compute<T>* rows, Compute<T>* left,
                  Compute<T>* spatial_left, const Start<Compute<T>>& start) {
  using Real = Compute<T>;
  const Real factor = Real(p.scale * 1.4426950408889634);
  const T* q_content = at<T>(p.q_content, image, head) + query * p.q_content.item;
  const T* q_spatial = at<T>(p.q_spatial, image, head) + query * p.q_spatial.item;
  pack_left(left, q_content, p.q_content.item, count, 0, p.d, factor);
  fill(start.rows, size_t(kRows * shape.height) * sizeof(Real));
  if (!p.is_separable()) {
    pack_left(left, q_spatial, p.q_spatial.item, count, p.d, p.ds, factor);
    return;
  }
  pack_left(spatial_left, q_spatial, p.q_spatial.item, count, 0, p.ds, factor);
  fill(start.columns, size_t(kRows * shape.width) * sizeof(Real));
  multiply(spatial_left, columns, p.ds, p.width, start.columns, kPanel<Real>, shape.width);
  multiply(spatial_left, rows, p.ds, p.height, start.rows, kPanel<Real>, shape.height);
}

template <typename T>
void pack_keys(const Problem& p, const Shape<Compute<T>>& shape, int64_t image, int64_t head, const Tile& tile,
               const int32_t* positions, Compute<T>* keys) {
  using Real = Compute<T>;
  pack_transposed(keys, shape.depth, at<T>(p.k_content, image, head), p.k_content.item, positions, tile.keys, p.d);
  if (!p.is_separable()) {
    pack_transposed(keys + p.d * kPanel<Real>, shape.depth, at<T>(p.spatial, image, head), p.spatial.item, positions,
                    tile.keys, p.ds);
  }
}

// What one block of kRows queries carries from tile to tile.
template <typename Real>
struct Running {
  Real reference[kRows];
  Vector<Real> total[kRows];
};

// Scores become weights in place; their sums are added to `total`. Returns the largest sum of a lane.
template <typename Real>
CONDDETR_INLINE Real make_weights(Real* scores, int64_t keys, Vector<Real>* total) {
  constexpr int L = kLanes<Real>;
  Vector<Real> worst = {};
  for (int m = 0; m < kRows; ++m) {
    Vector<Real> sum = {};
    for (int64_t i = 0; i < keys; i += L) {
      const Vector<Real> weight = exp2<Real>(load_vector(scores + m * kStride + i));
      store_vector(scores + m * kStride + i, weight);
      sum += weight;
    }
    total[m] += sum;
    worst = sum > worst ? sum : worst;
  }
  return largest_of<Real>(worst);
}

// Measures each query's scores against their maximum from now on, if it is higher than before: what was summed so far
// shrinks. Before the first tile there is no reference and nothing was summed.
template <typename Real>
void raise_reference(Real* scores, int64_t keys, Running<Real>& running, const Shape<Real>& shape,
                     const Start<Real>& start, Real* sums, bool is_first) {
  constexpr int L = kLanes<Real>;
  for (int m = 0; m < kRows; ++m) {
    Real* row = scores + m * kStride;
    Vector<Real> highest = load_vector(row);
    for (int64_t i = L; i < keys; i += L) {
      const Vector<Real> next = load_vector(row + i);
      highest = next > highest ? next : highest;
    }
    const Real largest = largest_of<Real>(highest), rise = is_first || largest > 0 ? largest : Real(0);
    for (int64_t i = 0; i < keys; i += L) store_vector(row + i, load_vector(row + i) - rise);
    running.reference[m] += rise;
    for (int64_t y = 0; y < shape.height; ++y) start.rows[m * shape.height + y] -= rise;
    if (is_first) continue;
    const Vector<Real> shrink = exp2<Real>(broadcast(-rise));
    running.total[m] *= shrink;
    for (int64_t panel = 0; panel * kPanel<Real> < shape.values; ++panel) {
      Real* sum = sums + (panel * kRows + m) * kPanel<Real>;
      for (int i = 0; i < kPanel<Real>; i += L) store_vector(sum + i, load_vector(sum + i) * shrink);
    }
  }
}

template <typename T>
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
    start_columns = arena.take<Real>(blocks * kRows * shape.width);
    start_rows = arena.take<Real>(blocks * kRows * shape.height);
    sums = arena.take<Real>(blocks * kRows * shape.values);
    columns = arena.take<Real>(p.ds * shape.width);
    rows = arena.take<Real>(p.ds * shape.height);
    spatial_left = arena.take<Real>(left_size(p.ds));
    keys = arena.take<Real>(kTileKeys * shape.depth);
    values = arena.take<Real>(kTileKeys * shape.values);
    scores = arena.take<Real>(2 * kRows * kStride);
    kept = arena.take<Real>(kStride);
    positions = arena.take<int32_t>(kTileKeys + p.width + p.height);
  }

  Start<Real> start(int64_t block) const {
    return {start_columns + block * kRows * shape.width, start_rows + block * kRows * shape.height};
  }

  void run() {
    fill(sums, size_t(blocks * kRows * shape.values) * sizeof(Real));
    fill(values, size_t(kTileKeys * shape.values) * sizeof(Real));
    pack_grid<T>(p, task.image, task.head, columns, rows, positions);
    for (int64_t block = 0; block < blocks; ++block) {
      running[block] = {};
      pack_queries<T>(p, shape, task.image, task.head, first_query(block), count(block), columns, rows,
                      left + block * left_size(shape.depth), spatial_left, start(block));
    }
    const Keys& visited = p.visited[task.image];
    for (int64_t t = 0; t < visited.count; ++t) {
      const Tile& tile = visited.tiles[t];
      tile_positions(p, visited, tile, positions);
      pack_keys<T>(p, shape, task.image, task.head, tile, positions, keys);
      pack_straight<T>(values, kTileKeys, at<T>(p.v, task.image, task.head), p.v.item, positions, tile.keys, 0, p.dv,
                       Real(1));
      // One block ahead: what was just written is not read at once.
      start_scores<Real>(p, visited, tile, shape, start(0), scores);
      for (int64_t block = 0; block < blocks; ++block) {
        Real *here = scores + block % 2 * kRows * kStride, *next = scores + (block + 1) % 2 * kRows * kStride;
        multiply_content(tile, block, here);
        if (block + 1 < blocks) start_scores<Real>(p, visited, tile, shape, start(block + 1), next);
        visit(visited, tile, block, here, t == 0);
      }
    }
    for (int64_t block = 0; block < blocks; ++block) write(block);
  }

  int64_t first_query(int64_t block) const { return task.begin + block * kRows; }
  int64_t count(int64_t block) const {
    const int64_t left_over = task.end - first_query(block);
    return left_over < kRows ? left_over : kRows;
  }

  void multiply_content(const Tile& tile, int64_t block, Real* scores) {
    multiply(left + block * left_size(shape.depth), keys, shape.depth, tile.keys, scores, kPanel<Real>, kStride);
  }

  // From the scores of one block of queries and one tile of keys to their part of the output.
  void visit(const Keys& visited, const Tile& tile, int64_t block, Real* scores, bool is_first) {
    Running<Real>& state = running[block];
    Real* block_sums = sums + block * kRows * shape.values;
    if (is_first) raise_reference<Real>(scores, tile.keys, state, shape, start(block), block_sums, true);
    const Running<Real> before = state;
    if (make_weights<Real>(scores, tile.keys, state.total) > Real(1 << 30)) {
      state = before;
      start_scores<Real>(p, visited, tile, shape, start(block), scores);
      multiply_content(tile, block, scores);
      raise_reference<Real>(scores, tile.keys, state, shape, start(block), block_sums, false);
      make_weights<Real>(scores, tile.keys, state.total);
    }
    if (p.dropout_p > 0) drop(visited, tile, block, scores);
    for (int64_t panel = 0; panel * kPanel<Real> < shape.values; ++panel) {
      product<kStride, 1>(tile.keys, scores, values + panel * kTileKeys * kPanel<Real>,
                          block_sums + panel * kRows * kPanel<Real>, kPanel<Real>);
    }
  }

  void drop(const Keys& visited, const Tile& tile, int64_t block, Real* scores) {
    const Dropout<Real> dropout(p);
    for (int m = 0; m < count(block); ++m) {
      dropout.fill(p, visited, tile, query_index(p, task.image, task.head, first_query(block) + m), kept);
      for (int i = 0; i < tile.keys; ++i) scores[m * kStride + i] *= kept[i];
    }
  }

  void write(int64_t block) {
    const Real* block_sums = sums + block * kRows * shape.values;
    for (int64_t m = 0; m < count(block); ++m) {
      const int64_t query = first_query(block) + m;
      const Real total = sum_of<Real>(running[block].total[m]), factor = inverse_total(total);
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
  Real *left, *start_columns, *start_rows, *sums, *columns, *rows, *spatial_left, *keys, *values, *scores, *kept;
  int32_t* positions;
};

// Log-sum-exps between -kModerate and kModerate are of moderate size: no power of two is too large or too small then.
constexpr int kModerate = 24;

// Backward: kBlockQueries queries × one tile at a time. With P the weights after dropout and dS the gradient of the
// scores: dq_c = dS·K, dk_c = dSᵀ·q_c, dv = Pᵀ·dO. Sums of dS over rows and columns of the grid are all that the
// spatial parts need (`Finish`), so that no gradient of a dense spatial key is ever made.
template <typename Real>
struct Partial {
  Partial(const Problem& p, const Shape<Real>& shape, Arena& arena)
      : queries(round_up(p.queries, kBlockQueries)),
        content(arena.take<Real>(queries * shape.content)),
        rows(arena.take<Real>(p.is_separable() ? queries * shape.height : 0)),
        columns(arena.take<Real>(p.is_separable() ? queries * shape.width : 0)) {}
  int64_t queries;
  Real* content;  // [block][panel][kRows][kPanel]: of the content query, before `scale`
  Real* rows;     // [queries][Shape::height]: Σ over x of dS
  Real* columns;  // [queries][Shape::width]: Σ over y of dS
};

template <typename T>
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
    start_columns = memory.take<Real>(blocks * kRows * shape.width);
    start_rows = memory.take<Real>(blocks * kRows * shape.height);
    columns = memory.take<Real>(p.ds * shape.width);
    rows = memory.take<Real>(p.ds * shape.height);
    spatial_left = memory.take<Real>(left_size(p.ds));
    keys_transposed = memory.take<Real>(kTileKeys * shape.depth);
    values_transposed = memory.take<Real>(kTileKeys * p.dv);
    keys = memory.take<Real>(kTileKeys * shape.content);
    weights = memory.take<Real>(kBlockQueries * kStride);
    slopes = memory.take<Real>(kBlockQueries * kStride);
    key_sums = memory.take<Real>(kTileKeys * shape.content);
    value_sums = memory.take<Real>(kTileKeys * shape.values);
    kept = memory.take<Real>(kStride);
    positions = memory.take<int32_t>(kTileKeys + p.width + p.height + sums.queries);
  }

  Start<Real> start(int64_t block) const {
    return {start_columns + block * kRows * shape.width, start_rows + block * kRows * shape.height};
  }
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
      pack_tile(tile);
      for (int64_t first = 0; first < blocks; first += kBlockQueries / kRows) visit(visited, tile, first);
      write(tile);
    }
  }

  void pack() {
    pack_grid<T>(p, task.image, task.head, columns, rows, positions);
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
      pack_queries<T>(p, shape, task.image, task.head, query, count(block), columns, rows,
                      left + block * left_size(shape.depth), spatial_left, start(block));
      for (int64_t m = 0; m < kRows; ++m) pack_row(block, m);
      pack_left(upstream_left + block * left_size(p.dv), scaled + query * p.dv, p.dv, count(block), 0, p.dv, Real(1));
    }
    pack_straight(upstream, sums.queries, scaled, p.dv, positions, p.queries, 0, p.dv, Real(1));
  }

  // A query's weight is 2^(score - shift) · factor, with factor = 2^(shift - lse). Where the scores are of moderate size
  // there is no shift, so that they are rounded once less and as the small numbers that they are. The factor goes to
  // dO, and delta = dO·O with it.
  void pack_row(int64_t block, int64_t m) {
    const int64_t query = block * kRows + m;
    Real factor = 0, total = 0;
    if (m < count(block)) {
      const Real lse = static_cast<const Real*>(u.lse)[query_index(p, task.image, task.head, query)];
      const bool is_seen = lse != Real(INFINITY);  // it has a key
      const Real shift = !is_seen || (lse > -kModerate && lse < kModerate) ? Real(0) : ::round(lse);
      if (is_seen) factor = ::exp2(shift - lse);
      Real* row = start(block).rows + m * shape.height;
      for (int64_t y = 0; shift != 0 && y < shape.height; ++y) row[y] -= shift;
      scale(scaled + query * p.dv, row_of(u.grad, query), p.dv, factor);
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
    start_scores<Real>(p, visited, tile, shape, start(block), weight);
    multiply(left + block * left_size(shape.depth), keys_transposed, shape.depth, tile.keys, weight, P, kStride);
    multiply<false>(upstream_left + block * left_size(p.dv), values_transposed, p.dv, tile.keys, slope, P, kStride);
    const Dropout<Real> dropout(p);
    for (int m = 0; m < kRows; ++m) {
      Real *w = weight + m * kStride, *s = slope + m * kStride;
      const Vector<Real> less = broadcast(delta[block * kRows + m]);
      if (p.dropout_p > 0) {
        dropout.fill(p, visited, tile, query_index(p, task.image, task.head, block * kRows + m), kept);
        for (int i = 0; i < tile.keys; i += L) {
          const Vector<Real> value = exp2<Real>(load_vector(w + i)), factor = load_vector(kept + i);
          store_vector(w + i, value * factor);
          store_vector(s + i, value * (load_vector(s + i) * factor - less));
        }
      } else {
        for (int i = 0; i < tile.keys; i += L) {
          const Vector<Real> value = exp2<Real>(load_vector(w + i));
          store_vector(w + i, value);
          store_vector(s + i, value * (load_vector(s + i) - less));
        }
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
  Real *left, *upstream_left, *queries, *upstream, *scaled, *delta, *start_columns, *start_rows, *columns, *rows, *spatial_left;
  Real *keys_transposed, *values_transposed, *keys, *weights, *slopes, *key_sums, *value_sums, *kept;
  int32_t* positions;
};

// What is left when all tiles of one image's head are done: the parts are added, always in the same order, and the
// gradients of both queries, of R and of C are made from them.
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
      Real *to = reinterpret_cast<Real*>(partials), *from = reinterpret_cast<Real*>(partials + part * first_arena.used());
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
    turned = memory.take<Real>(kRows * p.queries);
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
        for (int64_t m = 0; m < count; ++m) turned[m * p.queries + query] = slopes[query * stride + item + m];
      }
      fill(out, size_t(kRows * shape.spatial) * sizeof(Real));
      pack_left(left, turned, p.queries, count, 0, p.queries, Real(1));
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
  Real *rows, *columns, *queries, *left, *out, *turned;
};

template <typename T>
void run_forward(const Problem& p, const Result& r, const Task& task) {
  Forward<T>(p, r, task).run();
}

template <typename T>
void run_backward(const Problem& p, const Upstream& u, const Gradients& g, const Task& task, void* partial) {
  Backward<T>(p, u, g, task, partial).run();
}

template <typename T>
void run_finish(const Problem& p, const Gradients& g, int64_t image, int64_t head, void* partials, int64_t count) {
  Finish<T>(p, g, image, head).run(static_cast<char*>(partials), count);
}

template <typename T>
void count_partial(const Problem& p, size_t& bytes) {
  Arena counting(nullptr);
  const Partial<Compute<T>> partial(p, Shape<Compute<T>>(p), counting);
  bytes = counting.used();
}

}  // namespace

void forward(const Problem& p, const Result& r, const Task& task) {
  CONDDETR_FOR_STORED(p.stored, run_forward, p, r, task);
}

void partial_bytes(const Problem& p, size_t& bytes) { CONDDETR_FOR_STORED(p.stored, count_partial, p, bytes); }

void backward(const Problem& p, const Upstream& u, const Gradients& g, const Task& task, void* partial) {
  CONDDETR_FOR_STORED(p.stored, run_backward, p, u, g, task, partial);
}

void finish(const Problem& p, const Gradients& g, int64_t image, int64_t head, void* partials, int64_t count) {
  CONDDETR_FOR_STORED(p.stored, run_finish, p, g, image, head, partials, count);
}

}  // namespace conddetr::attn::CONDDETR_LEVEL
