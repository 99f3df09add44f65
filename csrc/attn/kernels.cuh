// Conditional attention on NVIDIA GPUs: which weights dropout keeps, forward, and backward in three passes. Heads are 32
// channels wide. No sum depends on the order in which blocks run: results repeat bit for bit.
//
// Separable spatial keys are never built in the passes over queries: q_s·R[y] + q_s·C[x] starts a score, from a table
// that each block makes for its queries. Going back, the gradient of scores is summed over the columns and over the rows
// of the grid into a table of the same form, from which all spatial gradients follow.
#pragma once

#include <bit>

#include "attn/octets.h"
#include "attn/tile.cuh"
#include "common/softmax.h"

namespace conddetr::attn {

// [batch, items, heads, 32]; strides in numbers, of multiples of 16 bytes.
template <typename T>
struct Rows {
  const T* data;
  int64_t image, item, head;

  __device__ const T* of(int in_image, int in_head) const { return data + in_image * image + in_head * head; }
};

// The inputs. With separable keys `spatial` has the grid's rows, `columns` its columns; else `columns` has no data, and
// the grid has one row.
template <typename T>
struct Problem {
  Rows<T> q_content, q_spatial, k_content, spatial, columns, v;
  int queries, keys, heads, height, width;
  const int32_t* valid_hw;  // or null
  const bool* padding;      // [batch, keys], or null
  const uint64_t* keep;     // [batch, heads, queries, tiles of the grid], bit 8 i + j for key j of octet i; or null
  int keep_tiles;
  float scale, log2_scale;  // the latter with log2(e), and never 0: a hidden score is infinite, its product too
  float hidden;             // -inf times the sign of the scale
  float kept_factor;        // 1 / (1 - p)

  __device__ Octets octets(int image) const { return {valid_rectangle(valid_hw, image, height, width)}; }
  __device__ int64_t query_index(int image, int head, int query) const {
    return (int64_t(image) * heads + head) * queries + query;
  }
  __device__ uint64_t keep_word(int image, int head, int query, int tile) const {
    return keep[query_index(image, head, query < queries ? query : queries - 1) * keep_tiles + tile];
  }
};

// Of out, contiguous [batch, queries, heads, 32]; lse and delta [batch, heads, queries].
template <typename T>
struct Upstream {
  const T* grad;
  const T* out;
  const float* lse;
  float* delta;
};

struct Lane {
  int warp, g, t;
  __device__ Lane() : warp(threadIdx.x / kLanes), g(threadIdx.x % kLanes / 4), t(threadIdx.x % 4) {}
  __device__ int first_row() const { return warp * kWarpRows; }
};

__device__ __forceinline__ bool has_bit(uint64_t bits, int index) { return bits >> index & 1; }

// Of the four groups of 16 columns of a tile, so many at most are unrolled going back; with more, registers spill.
template <typename T>
constexpr int kUnrolledGroups = sizeof(T) == 2 ? 2 : 1;

constexpr uint64_t kAll = ~0ull;

// Blocks that a multiprocessor holds at least, as far as registers go: 168 for each thread, or all 255.
template <typename T>
constexpr int kBlocks = sizeof(T) == 2 ? 3 : 2;

// Hands out a block's shared memory.
struct Shared {
  char* next = shared_memory();

  template <typename V>
  __device__ V* take(int count) {
    V* found = reinterpret_cast<V*>(next);
    next += count * int(sizeof(V));
    return found;
  }
  template <typename T>
  __device__ Tile<T> tile(int count = 1) {
    return {take<T>(count * kTile * kWidth)};
  }
};

template <typename T>
__device__ __forceinline__ Tile<T> stage(Tile<T> tiles, int index) {
  return {tiles.data + index * (kTile * kWidth)};
}

// Bit s: whether key s of a tile is seen: inside the rectangle and no padding. All lanes of the warp take part.
template <typename T>
__device__ __forceinline__ uint64_t visible_keys(const Problem<T>& p, int image, const Octets& octets, int tile) {
  uint64_t bits = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Key key = octets.key(tile, kLanes * half + threadIdx.x % kLanes);
    bool is_visible = key.is_inside;
    if (is_visible && p.padding) is_visible = !p.padding[int64_t(image) * p.keys + key.y * p.width + key.x];
    bits |= uint64_t(ballot(is_visible)) << (kLanes * half);
  }
  return bits;
}

template <typename T>
__device__ __forceinline__ void load_keys(Tile<T> tile, const Rows<T>& rows, const Problem<T>& p, int image, int head,
                                          const Octets& octets, int index) {
  load_tile(tile, rows.of(image, head), rows.item, [&](int slot) -> int64_t {
    const Key key = octets.key(index, slot);
    return key.is_inside ? int64_t(key.y) * p.width + key.x : -1;
  });
}

template <int kQueries = kTile, typename T>
__device__ __forceinline__ void load_queries(Tile<T> tile, const T* base, int64_t stride, int first, int queries) {
  load_tile<kQueries>(tile, base, stride, [=](int row) -> int64_t { return first + row < queries ? first + row : -1; });
}

template <int N>
__device__ __forceinline__ void clear(float (&values)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i][0] = values[i][1] = values[i][2] = values[i][3] = 0.0f;
}

// What a block of 64 queries knows of the rows and columns of the grid: [height, then columns, then height again] × 64.
// First the parts q_s·R[y] and q_s·C[x] of scores; behind the former, over the latter, the sums of their gradients. A
// warp touches only its own 16 queries.
struct Table {
  static constexpr int kStride = kTile + 4;  // four columns at eight queries each: 32 banks
  float* data;
  int height, columns;  // of the valid rectangle; columns are padded to octets

  __device__ Table(float* data, const Octets& octets)
      : data(data), height(octets.valid.height), columns(octets.columns() * kOctet) {}

  static constexpr int64_t bytes(int64_t height, int64_t width, bool has_sums) {
    return (height * (has_sums ? 2 : 1) + (width + kOctet - 1) / kOctet * kOctet) * kStride * int(sizeof(float));
  }

  __device__ float* row(int y) const { return data + y * kStride; }
  __device__ float* column(int x) const { return data + (height + x) * kStride; }
  __device__ float* row_sum(int y) const { return data + (height + columns + y) * kStride; }

  // Starts to copy R and C for 64 lines of the table.
  template <typename T>
  __device__ void load(Tile<T> tile, const Problem<T>& p, int image, int head, int valid_width, int first) const {
    const T *rows = p.spatial.of(image, head), *columns_of = p.columns.of(image, head);
    const int64_t row_stride = p.spatial.item, column_stride = p.columns.item;
#pragma unroll
    for (int i = 0; i < kTile * Tile<T>::kChunks / kThreads; ++i) {
      const int index = i * kThreads + threadIdx.x, slot = index / Tile<T>::kChunks, chunk = index % Tile<T>::kChunks;
      const int line = first + slot, x = line - height, y = x < 0 ? line : x - columns;
      const bool is_column = x >= 0 && x < columns;
      const T* source = is_column ? columns_of + x * column_stride : rows + y * row_stride;
      const bool is_inside = is_column ? x < valid_width : y < height;
      copy_async(tile.chunk(slot, chunk), (is_inside ? source : rows) + chunk * Tile<T>::kPerChunk, is_inside);
    }
  }

  // Fills the parts of scores. `tile` is scratch memory; ends with a barrier.
  template <typename T>
  __device__ void fill(const Fragment<T>& q_spatial, Tile<T> tile, const Problem<T>& p, int image, int head,
                       int valid_width) const {
    const Lane lane;
    const int lines = height + columns;
    for (int first = 0; first < lines; first += kTile) {
      load(tile, p, image, head, valid_width, first);
      end_group();
      wait_group<0>();
      barrier();
      for (int group = 0; group < kTile / 16; ++group) {
        float part[2][4];
        clear(part);
        multiply_rows(part, q_spatial, tile, 16 * group);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int line = first + 16 * group + i / 4 * 8 + 2 * lane.t + i % 2;
          if (line < lines) row(line)[lane.first_row() + lane.g + i / 2 % 2 * 8] = part[i / 4][i % 4];
        }
      }
      barrier();
    }
  }
};

// Starts the scores of one octet after the other with their spatial part, from the table.
struct Start {
  const Table& table;
  int query;  // of this lane's row g
  Walk walk;
  float column[4];

  __device__ Start(const Table& table, const Octets& octets, const Lane& lane)
      : table(table), query(lane.first_row() + lane.g), walk(octets) {}

  // Also before the first octet, once the table is filled.
  __device__ void load_column() {
    const int x = walk.column * kOctet + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) column[i] = table.column(x + i % 2)[query + i / 2 * 8];
  }
  __device__ void next(float (&scores)[4]) {
    const float upper = table.row(walk.y)[query], lower = table.row(walk.y)[query + 8];
    scores[0] = upper + column[0];
    scores[1] = upper + column[1];
    scores[2] = lower + column[2];
    scores[3] = lower + column[3];
    if (walk.next()) load_column();
  }
};

constexpr int kKeepThreads = 256;

// Whether dropout keeps weights, eight keys at a time; a thread makes one word of `Problem::keep`.
__global__ void __launch_bounds__(kKeepThreads)
    keep_kernel(uint64_t* keep, const int64_t* seed, const int32_t* valid_hw, int64_t count, int queries, int keys,
                int heads, int height, int width, int keep_tiles, uint32_t threshold) {
  const int64_t index = int64_t(blockIdx.x) * kKeepThreads + threadIdx.x;
  if (index >= count) return;
  const int64_t query_index = index / keep_tiles;
  const int tile = int(index - query_index * keep_tiles);
  const Octets octets{valid_rectangle(valid_hw, query_index / (int64_t(queries) * heads), height, width)};
  uint64_t bits = 0;
  for (int octet = 0; octet < kTileOctets; ++octet) {
    const Key key = octets.key(tile, octet * kOctet);
    if (!key.is_inside) break;
    const int64_t ordinal = int64_t(key.y) * octets.valid.width + key.x;
    bits |= uint64_t(keep_octet(uint64_t(*seed), query_index, keys, ordinal, threshold)) << (kOctet * octet);
  }
  keep[index] = bits;
}

// 2^x for x <= 0 without the special-function unit: a series about the nearest whole number, which then goes into the
// exponent. Relative error below 3e-6; zero below 2^-127. A NaN stays one.
__device__ __forceinline__ float exp2_series(float x) {
  x = x < -127.0f ? -127.0f : x;
  const float shifted = x + 12582912.0f;  // 1.5 · 2^23: rounds, and leaves the whole number in the lowest bits
  const float fraction = x - (shifted - 12582912.0f);
  float result = 0.009570102f;
  result = result * fraction + 0.05591786f;
  result = result * fraction + 0.24024744f;
  result = result * fraction + 0.6931218f;
  result = result * fraction + 0.9999993f;
  return result * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127) << 23);
}

// One tile of the online softmax. On entry scores before the scale, on return weights. If the scale is known to be
// positive, the maximum is found before it; of the 16 exponentials of a row, the last `kSeries` are series.
template <bool kIsPositive = false, int kSeries = 0>
struct Softmax {
  float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // of rows g and g + 8; totals of this lane's columns
  float shrink[2];                                               // what sums so far are to be multiplied with

  __device__ void update(float (&scores)[8][4], float log2_scale) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float higher = kIsPositive ? scores[0][2 * row] : highest[row];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float score = scores[i / 2][2 * row + i % 2];
        higher = fmaxf(higher, kIsPositive ? score : score * log2_scale);
      }
      if constexpr (kIsPositive) higher = fmaxf(highest[row], higher * log2_scale);
      higher = fmaxf(higher, from_lane_xor(higher, 1));
      higher = fmaxf(higher, from_lane_xor(higher, 2));
      const float reference = softmax_reference(higher);
      shrink[row] = exp2_fast(highest[row] - reference);
      highest[row] = higher;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& score = scores[i / 2][2 * row + i % 2];
        const float power = score * log2_scale - reference;  // fused: rounded once
        score = i < 16 - kSeries ? exp2_fast(power) : exp2_series(power);
        sum += score;
      }
      total[row] = total[row] * shrink[row] + sum;
    }
  }

  __device__ float sum(int row) const {
    const float pair = total[row] + from_lane_xor(total[row], 1);
    return pair + from_lane_xor(pair, 2);
  }
};

// Hides the scores of keys that are not seen.
__device__ __forceinline__ void hide(float (&scores)[8][4], uint64_t visible, float hidden, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (!has_bit(visible >> 2 * lane.t, i / 4 * 8 + i % 2)) scores[i / 4][i % 4] = hidden;
  }
}

// Zeros the weights that dropout does not keep; `first` is the block's first query.
template <typename T>
__device__ __forceinline__ void drop(float (&weights)[8][4], const Problem<T>& p, int image, int head, int first,
                                     int tile, const Lane& lane) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const uint64_t keep = p.keep_word(image, head, first + lane.first_row() + lane.g + 8 * row, tile);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (!has_bit(keep >> 2 * lane.t, i / 2 * 8 + i % 2)) weights[i / 2][2 * row + i % 2] = 0;
    }
  }
}

// Writes the output and lse of a warp's queries, through a tile that is free.
template <typename T, typename AnySoftmax>
__device__ __forceinline__ void store_forward(T* out, float* lse, float (&sums)[4][4], const AnySoftmax& softmax,
                                              const Problem<T>& p, int image, int head, int first, Tile<T> tile,
                                              const Lane& lane) {
  const float totals[2] = {softmax.sum(0), softmax.sum(1)};
#pragma unroll
  for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] *= inverse_total(totals[i / 2 % 2]) * p.kept_factor;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int query = first + lane.first_row() + lane.g + 8 * row;
    if (lane.t == 0 && query < p.queries) {
      lse[p.query_index(image, head, query)] = log_sum_exp2(softmax.highest[row], totals[row]);
    }
  }
  const int64_t stride = int64_t(p.heads) * kWidth;
  store_rows(out + int64_t(image) * p.queries * stride + head * kWidth, stride, sums, tile, lane.first_row(),
             [=](int row) -> int64_t { return first + row < p.queries ? first + row : -1; });
}

// Bytes of shared memory of the three large kernels, for a grid of at most this size.
struct SharedBytes {
  int64_t forward, backward_query, backward_key;
};
template <typename T, bool kSeparable>
constexpr SharedBytes shared_bytes(int64_t height, int64_t width) {
  constexpr int64_t kTileBytes = Tile<T>::kBytes, kPerQuery = sizeof(uint64_t) + 2 * sizeof(float);
  if (kSeparable) {
    return {5 * kTileBytes + Table::bytes(height, width, false), 6 * kTileBytes + Table::bytes(height, width, true),
            9 * kTileBytes + 2 * kTile * kPerQuery};
  }
  return {8 * kTileBytes, 9 * kTileBytes, 9 * kTileBytes + 2 * kTile * kPerQuery};
}

// A block has 64 queries of one head of one image, a warp 16 of them; keys go by in tiles, two in flight.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) forward_kernel(Problem<T> p, T* out, float* lse) {
  const int first = blockIdx.x * kTile, head = blockIdx.y, image = blockIdx.z;
  const Octets octets = p.octets(image);
  const int tiles = octets.tiles();
  const Lane lane;
  Shared shared;
  const Tile<T> q_content = shared.tile<T>(), keys = shared.tile<T>(2), values = shared.tile<T>(2);
  const Tile<T> spatial = shared.tile<T>(kSeparable ? 0 : 2);
  // The table needs the spatial query once, dense keys to the end.
  const Tile<T> q_spatial = kSeparable ? stage(keys, 1) : shared.tile<T>();
  const Table table(shared.take<float>(0), octets);
  const auto load = [&](int tile) {
    load_keys(stage(keys, tile % 2), p.k_content, p, image, head, octets, tile);
    load_keys(stage(values, tile % 2), p.v, p, image, head, octets, tile);
    if constexpr (!kSeparable) load_keys(stage(spatial, tile % 2), p.spatial, p, image, head, octets, tile);
  };

  load_queries(q_content, p.q_content.of(image, head), p.q_content.item, first, p.queries);
  load_queries(q_spatial, p.q_spatial.of(image, head), p.q_spatial.item, first, p.queries);
  load(0);
  end_group();
  wait_group<0>();
  barrier();
  const Fragment<T> content(q_content, lane.first_row()), conditional(q_spatial, lane.first_row());
  Start start(table, octets, lane);
  if constexpr (kSeparable) {
    table.fill(conditional, stage(values, 1), p, image, head, octets.valid.width);
    start.load_column();
  }

  Softmax<> softmax;
  float sums[4][4];
  clear(sums);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) load(tile + 1);
    end_group();
    wait_group<1>();
    barrier();
    float weights[8][4];
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      float scores[2][4];
      clear(scores);
      if constexpr (kSeparable) {
        start.next(scores[0]);
        start.next(scores[1]);
      } else {
        multiply_rows(scores, conditional, stage(spatial, tile % 2), 16 * group);
      }
      multiply_rows(scores, content, stage(keys, tile % 2), 16 * group);
#pragma unroll
      for (int i = 0; i < 8; ++i) weights[2 * group + i / 4][i % 4] = scores[i / 4][i % 4];
    }
    const uint64_t visible = visible_keys(p, image, octets, tile);
    if (visible != kAll) hide(weights, visible, p.hidden, lane);
    softmax.update(weights, p.log2_scale);
    if (p.keep) drop(weights, p, image, head, first, tile, lane);
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] *= softmax.shrink[i / 2 % 2];
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      const float left[2][4] = {{weights[2 * group][0], weights[2 * group][1], weights[2 * group][2], weights[2 * group][3]},
                                {weights[2 * group + 1][0], weights[2 * group + 1][1], weights[2 * group + 1][2],
                                 weights[2 * group + 1][3]}};
      multiply_columns(sums, left, stage(values, tile % 2), 16 * group);
    }
    barrier();
  }

  store_forward(out, lse, sums, softmax, p, image, head, first, q_content, lane);
}

// Gradients of both queries, and delta = grad · out. With separable keys, `sums` [batch, heads, width + height, queries]
// gets the gradient of scores summed over rows for each column, then over columns for each row, of the valid rectangle.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_query_kernel(Problem<T> p, Upstream<T> upstream, T* grad_content, T* grad_spatial, float* sums) {
  const int first = blockIdx.x * kTile, head = blockIdx.y, image = blockIdx.z;
  const Octets octets = p.octets(image);
  const int tiles = octets.tiles();
  const Lane lane;
  Shared shared;
  const Tile<T> q_content = shared.tile<T>(), gradient = shared.tile<T>();
  const Tile<T> keys = shared.tile<T>(2), values = shared.tile<T>(2), spatial = shared.tile<T>(kSeparable ? 0 : 2);
  const Tile<T> q_spatial = kSeparable ? stage(keys, 1) : shared.tile<T>();
  const Table table(shared.take<float>(0), octets);
  const auto load = [&](int tile) {
    load_keys(stage(keys, tile % 2), p.k_content, p, image, head, octets, tile);
    load_keys(stage(values, tile % 2), p.v, p, image, head, octets, tile);
    if constexpr (!kSeparable) load_keys(stage(spatial, tile % 2), p.spatial, p, image, head, octets, tile);
  };

  const int64_t stride = int64_t(p.heads) * kWidth, offset = int64_t(image) * p.queries * stride + head * kWidth;
  load_queries(q_content, p.q_content.of(image, head), p.q_content.item, first, p.queries);
  load_queries(q_spatial, p.q_spatial.of(image, head), p.q_spatial.item, first, p.queries);
  load_queries(gradient, upstream.grad + offset, stride, first, p.queries);
  load_queries(stage(values, 1), upstream.out + offset, stride, first, p.queries);
  load(0);
  end_group();
  wait_group<0>();
  barrier();
  float lse[2], delta[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int in_tile = lane.first_row() + lane.g + 8 * row, query = first + in_tile;
    float part = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int channel = 8 * lane.t + i;
      part += to_float(*gradient.at(in_tile, channel)) * to_float(*stage(values, 1).at(in_tile, channel));
    }
    part += from_lane_xor(part, 1);
    delta[row] = part + from_lane_xor(part, 2);
    lse[row] = query < p.queries ? upstream.lse[p.query_index(image, head, query)] : INFINITY;
    if (lane.t == 0 && query < p.queries) upstream.delta[p.query_index(image, head, query)] = delta[row];
  }
  barrier();
  const Fragment<T> content(q_content, lane.first_row()), conditional(q_spatial, lane.first_row());
  const Fragment<T> grads(gradient, lane.first_row());
  Start start(table, octets, lane);
  if constexpr (kSeparable) {
    table.fill(conditional, stage(values, 1), p, image, head, octets.valid.width);
    for (int i = threadIdx.x; i < table.height * Table::kStride; i += kThreads) table.row_sum(0)[i] = 0;
    start.load_column();
    barrier();
  }
  Walk walk(octets);
  float column_sum[4] = {0, 0, 0, 0};
  const auto store_column_sum = [&](int column) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      table.column(column * kOctet + 2 * lane.t + i % 2)[lane.first_row() + lane.g + i / 2 * 8] = column_sum[i];
      column_sum[i] = 0;
    }
  };

  float by_content[4][4], by_spatial[4][4];
  clear(by_content);
  clear(by_spatial);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) load(tile + 1);
    end_group();
    wait_group<1>();
    barrier();
    const uint64_t visible = visible_keys(p, image, octets, tile);
    uint64_t keep[2] = {kAll, kAll};
    if (p.keep) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        keep[row] = p.keep_word(image, head, first + lane.first_row() + lane.g + 8 * row, tile) >> 2 * lane.t;
      }
    }
    float octet_sum[4] = {0, 0, 0, 0};
#pragma unroll kUnrolledGroups<T>
    for (int group = 0; group < 4; ++group) {
      float scores[2][4], grad_weights[2][4];
      clear(scores);
      clear(grad_weights);
      if constexpr (kSeparable) {
        start.next(scores[0]);
        start.next(scores[1]);
      } else {
        multiply_rows(scores, conditional, stage(spatial, tile % 2), 16 * group);
      }
      multiply_rows(scores, content, stage(keys, tile % 2), 16 * group);
      multiply_rows(grad_weights, grads, stage(values, tile % 2), 16 * group);
      float by_score[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = i / 2 % 2, key = 16 * group + i / 4 * 8 + i % 2;  // of those that start at this lane's
        float score = scores[i / 4][i % 4], grad_weight = grad_weights[i / 4][i % 4];
        if (visible != kAll && !has_bit(visible >> 2 * lane.t, key)) score = p.hidden;
        if (p.keep) grad_weight = has_bit(keep[row], key) ? grad_weight * p.kept_factor : 0.0f;
        const float weight = exp2_fast(score * p.log2_scale - lse[row]);
        by_score[i / 4][i % 4] = weight * (grad_weight - delta[row]) * p.scale;
      }
      multiply_columns(by_content, by_score, stage(keys, tile % 2), 16 * group);
      if constexpr (kSeparable) {
        add_octets<T>(octet_sum, by_score, group);
#pragma unroll
        for (int octet = 0; octet < 2; ++octet) {
#pragma unroll
          for (int i = 0; i < 4; ++i) column_sum[i] += by_score[octet][i];
          const int column = walk.column;
          if (walk.next()) store_column_sum(column);
        }
      } else {
        multiply_columns(by_spatial, by_score, stage(spatial, tile % 2), 16 * group);
      }
    }
    if constexpr (kSeparable) {
      // In fewer than eight rows, octets of one tile share a row: lanes then take turns.
      const int turns = table.height < kTileOctets ? 4 : 1;
      for (int turn = 0; turn < turns; ++turn) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int octet = tile * kTileOctets + 2 * lane.t + i % 2;
          if (octet < octets.count() && (turns == 1 || turn == lane.t)) {
            table.row_sum(octet % table.height)[lane.first_row() + lane.g + i / 2 * 8] += octet_sum[i];
          }
        }
        warp_barrier();
      }
    }
    barrier();
  }

  if constexpr (kSeparable) {
    store_column_sum(walk.column);
    barrier();
    const int lines = tiles > 0 ? table.columns + table.height : 0;
    for (int line = 0; line < lines; line += kTile) {
      table.load(stage(keys, 0), p, image, head, octets.valid.width, table.height + line);
      end_group();
      wait_group<0>();
      barrier();
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        float by_line[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int found = line + 16 * group + i / 4 * 8 + 2 * lane.t + i % 2;
          by_line[i / 4][i % 4] =
              found < lines ? table.column(found)[lane.first_row() + lane.g + i / 2 % 2 * 8] : 0.0f;
        }
        multiply_columns(by_spatial, by_line, stage(keys, 0), 16 * group);
      }
      barrier();
    }
    float* image_sums = sums + p.query_index(image, head, 0) * (p.width + p.height);
    for (int i = threadIdx.x; i < lines * kTile; i += kThreads) {
      const int line = i / kTile, query = first + i % kTile;
      const bool is_column = line < table.columns;
      const int target = is_column ? line : p.width + line - table.columns;
      if (query < p.queries && (!is_column || line < octets.valid.width)) {
        image_sums[int64_t(target) * p.queries + query] = table.column(line)[i % kTile];
      }
    }
  }
  const auto item_of = [=](int row) -> int64_t { return first + row < p.queries ? first + row : -1; };
  store_rows(grad_content + offset, stride, by_content, q_content, lane.first_row(), item_of);
  store_rows(grad_spatial + offset, stride, by_spatial, q_content, lane.first_row(), item_of);
}

// Gradients of content keys, values and dense spatial keys, contiguous [batch, keys, heads, 32], inside the valid
// rectangle. A block has one tile of keys, a warp 16 of them as rows; queries go by as columns.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_key_kernel(Problem<T> p, Upstream<T> upstream, T* grad_content, T* grad_spatial, T* grad_v) {
  const int tile = blockIdx.x, head = blockIdx.y, image = blockIdx.z;
  const Octets octets = p.octets(image);
  if (tile >= octets.tiles()) return;
  const Lane lane;
  Shared shared;
  const Tile<T> k_content = shared.tile<T>(), k_spatial = shared.tile<T>(), values = shared.tile<T>();
  const Tile<T> q_content = shared.tile<T>(2), q_spatial = shared.tile<T>(2), gradient = shared.tile<T>(2);
  uint64_t* keep_words = shared.take<uint64_t>(2 * kTile);
  const uint16_t* keep = reinterpret_cast<const uint16_t*>(keep_words);  // 16 bits for each warp
  float *lse = shared.take<float>(2 * kTile), *delta = shared.take<float>(2 * kTile);
  const int64_t stride = int64_t(p.heads) * kWidth;
  const T* grad_out = upstream.grad + int64_t(image) * p.queries * stride + head * kWidth;
  const auto load = [&](int block) {
    const int first = block * kTile, at = block % 2;
    load_queries(stage(q_content, at), p.q_content.of(image, head), p.q_content.item, first, p.queries);
    load_queries(stage(q_spatial, at), p.q_spatial.of(image, head), p.q_spatial.item, first, p.queries);
    load_queries(stage(gradient, at), grad_out, stride, first, p.queries);
    if (threadIdx.x < kTile) {
      const int query = first + threadIdx.x, slot = at * kTile + threadIdx.x;
      const bool is_query = query < p.queries;
      lse[slot] = is_query ? upstream.lse[p.query_index(image, head, query)] : INFINITY;
      delta[slot] = is_query ? upstream.delta[p.query_index(image, head, query)] : 0.0f;
      if (p.keep) keep_words[slot] = p.keep_word(image, head, query, tile);
    }
  };

  load_keys(k_content, p.k_content, p, image, head, octets, tile);
  load_keys(values, p.v, p, image, head, octets, tile);
  if constexpr (kSeparable) {
    const T *rows = p.spatial.of(image, head), *columns = p.columns.of(image, head);
    for (int i = threadIdx.x; i < kTile * kWidth; i += kThreads) {
      const int slot = i / kWidth, channel = i % kWidth;
      const Key key = octets.key(tile, slot);
      float sum = 0;
      if (key.is_inside) {
        sum = to_float(rows[key.y * p.spatial.item + channel]) + to_float(columns[key.x * p.columns.item + channel]);
      }
      *k_spatial.at(slot, channel) = from_float<T>(sum);
    }
  } else {
    load_keys(k_spatial, p.spatial, p, image, head, octets, tile);
  }
  load(0);
  end_group();
  wait_group<0>();
  barrier();
  const Fragment<T> content(k_content, lane.first_row()), conditional(k_spatial, lane.first_row());
  const Fragment<T> value(values, lane.first_row());
  const uint64_t visible = visible_keys(p, image, octets, tile) >> (lane.first_row() + lane.g);
  const bool is_visible[2] = {has_bit(visible, 0), has_bit(visible, 8)};

  float by_content[4][4], by_spatial[4][4], by_value[4][4];
  clear(by_content);
  clear(by_spatial);
  clear(by_value);
  const int blocks = (p.queries + kTile - 1) / kTile;
  for (int block = 0; block < blocks; ++block) {
    if (block + 1 < blocks) load(block + 1);
    end_group();
    wait_group<1>();
    barrier();
    const int at = block % 2;
#pragma unroll kSeparable ? kUnrolledGroups<T> : 1
    for (int group = 0; group < 4; ++group) {
      float scores[2][4], grad_weights[2][4];
      clear(scores);
      clear(grad_weights);
      multiply_rows(scores, conditional, stage(q_spatial, at), 16 * group);
      multiply_rows(scores, content, stage(q_content, at), 16 * group);
      multiply_rows(grad_weights, value, stage(gradient, at), 16 * group);
      float dropped[2][4], by_score[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = i / 2 % 2, query = at * kTile + 16 * group + i / 4 * 8 + 2 * lane.t + i % 2;
        const float score = is_visible[row] ? scores[i / 4][i % 4] : p.hidden;
        const float weight = exp2_fast(score * p.log2_scale - lse[query]);
        float factor = 1;
        if (p.keep) factor = has_bit(keep[4 * query + lane.warp], lane.g + 8 * row) ? p.kept_factor : 0.0f;
        dropped[i / 4][i % 4] = weight * factor;
        by_score[i / 4][i % 4] = weight * (grad_weights[i / 4][i % 4] * factor - delta[query]) * p.scale;
      }
      multiply_columns(by_value, dropped, stage(gradient, at), 16 * group);
      multiply_columns(by_content, by_score, stage(q_content, at), 16 * group);
      if constexpr (!kSeparable) multiply_columns(by_spatial, by_score, stage(q_spatial, at), 16 * group);
    }
    barrier();
  }

  const auto item_of = [&](int slot) -> int64_t {
    const Key key = octets.key(tile, slot);
    return key.is_inside ? int64_t(key.y) * p.width + key.x : -1;
  };
  const int64_t offset = int64_t(image) * p.keys * stride + head * kWidth;
  store_rows(grad_content + offset, stride, by_content, k_content, lane.first_row(), item_of);
  store_rows(grad_v + offset, stride, by_value, values, lane.first_row(), item_of);
  if constexpr (!kSeparable) store_rows(grad_spatial + offset, stride, by_spatial, k_spatial, lane.first_row(), item_of);
}

// Gradients of separable keys, contiguous [batch, height or width, heads, 32], from `sums` of backward_query_kernel. A
// block has 64 lines of it, a warp 16; zeros outside the valid rectangle.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_table_kernel(Problem<T> p, const float* sums, T* grad_rows, T* grad_columns) {
  const int first = blockIdx.x * kTile, head = blockIdx.y, image = blockIdx.z;
  const Rectangle valid = p.octets(image).valid;
  const bool has_keys = valid.height > 0 && valid.width > 0;
  const Lane lane;
  Shared shared;
  const Tile<T> q_spatial = shared.tile<T>(), staging = shared.tile<T>();
  const float* image_sums = sums + p.query_index(image, head, 0) * (p.width + p.height);
  float by_line[4][4];
  clear(by_line);
  for (int query = 0; query < p.queries; query += kTile) {
    load_queries(q_spatial, p.q_spatial.of(image, head), p.q_spatial.item, query, p.queries);
    end_group();
    wait_group<0>();
    barrier();
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      float by_score[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int line = first + lane.first_row() + lane.g + i / 2 % 2 * 8;
        const int column = query + 16 * group + i / 4 * 8 + 2 * lane.t + i % 2;
        const bool is_inside = line < p.width ? line < valid.width : line - p.width < valid.height;
        by_score[i / 4][i % 4] =
            has_keys && is_inside && column < p.queries ? image_sums[int64_t(line) * p.queries + column] : 0.0f;
      }
      multiply_columns(by_line, by_score, q_spatial, 16 * group);
    }
    barrier();
  }
  const int64_t stride = int64_t(p.heads) * kWidth;
  store_rows(grad_columns + int64_t(image) * p.width * stride + head * kWidth, stride, by_line, staging,
             lane.first_row(), [=](int row) -> int64_t { return first + row < p.width ? first + row : -1; });
  store_rows(grad_rows + int64_t(image) * p.height * stride + head * kWidth, stride, by_line, staging,
             lane.first_row(), [=](int row) -> int64_t {
               const int y = first + row - p.width;
               return y >= 0 && y < p.height ? y : -1;
             });
}

}  // namespace conddetr::attn
