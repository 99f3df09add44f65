// Conditional attention on Hopper, forward, for 16-bit numbers: what kernels.cuh does, with other products.
//
// - A warpgroup's product reads a tile of keys from shared memory once for 64 queries, a warp's for 16. Reading for 16
//   takes as long as the exponentials: 8 KiB at 128 bytes a clock are 64 clocks, and so are 1024 exponentials at 16.
// - With products this cheap, separable spatial keys need no table: rows[y] + columns[x] is built in shared memory, for
//   each key once, and takes part in the product. It is rounded to T, as dense keys are.
// - A block has 128 queries, so that keys are fetched half as often.
// - What is left of a tile for a warp, counted in the machine code: 337 instructions, one a clock, among them 34 of the
//   special-function unit, one in 8 clocks. So instructions are saved: a negative scale turns the queries' sign, and the
//   maximum then needs no scale; masks are looked at in the last tiles alone, where keys may be outside the rectangle.
//   One exponential in 16 is a series: 19 instructions more, 16 clocks less of that unit (`kSeries`; not measured).
//
// Tiles are copied as everywhere, 16 bytes at a time by all threads. cp.async.bulk copies bytes as they lie, and a row of
// 64 bytes has to be swizzled; cp.async.bulk.tensor does swizzle, but needs a map that the driver encodes for every call,
// and would fetch keys of the grid that lie outside the valid rectangle, whatever they are, where this writes zeros.
#pragma once

#include "attn/kernels.cuh"
#include "common/hopper.cuh"

namespace conddetr::attn {

constexpr int kGroups = 2;  // warpgroups of a block
constexpr int kGroupQueries = kGroups * kTile;
constexpr int kGroupThreads = kGroups * kThreads;
constexpr int kSeries = 1;  // of 16 exponentials

// A tile as products want it described (PTX ISA 9.0, 9.7.15.5.1.2.2): a matrix in rows of 64 bytes, with the swizzle of
// 64 bytes. That goes by the bits of addresses, so that its pattern starts at multiples of 512, as tiles do, and a
// product may start at any chunk of any eighth row.
//   bits 0-13   address / 16
//   bits 16-29  leading dimension: from one pattern of 64 bytes to the next; there is but one, and 1 stands for that
//   bits 32-45  stride dimension: from eight rows to the next, 512 bytes / 16
//   bits 62-63  2: swizzle of 64 bytes
struct Matrix {
  uint32_t low;

  template <typename T>
  __device__ explicit Matrix(Tile<T> tile) : low((shared_address(tile.data) & 0x3FFFF) >> 4 | 1 << 16) {
    static_assert(kWidth * sizeof(T) == 64);
  }

  // What starts so many bytes on.
  __device__ Matrix from(int bytes) const {
    Matrix found = *this;
    found.low += bytes >> 4;
    return found;
  }
  __device__ uint64_t description() const { return uint64_t(2u << 30 | 512 >> 4) << 32 | low; }
};

// What a thread does for each tile of keys: one chunk of 16 bytes of one key, in each of its tensors.
template <typename T>
struct Chunk {
  static_assert(kGroupThreads == kTile * Tile<T>::kChunks);
  int slot, chunk, width, height, tile_columns, tile_rows, x, y;

  __device__ explicit Chunk(const Octets& octets)
      : slot(threadIdx.x / Tile<T>::kChunks), chunk(threadIdx.x % Tile<T>::kChunks), width(octets.valid.width) {
    height = octets.valid.height > 0 ? octets.valid.height : 1;
    tile_columns = kTileOctets / height * kOctet;
    tile_rows = kTileOctets % height;
    x = slot / kOctet / height * kOctet + slot % kOctet;
    y = slot / kOctet % height;
  }

  // Past the last octet too x is outside.
  __device__ bool is_inside() const { return x < width; }

  // Goes on to the next tile.
  __device__ void next() {
    x += tile_columns;
    y += tile_rows;
    if (y < height) return;
    y -= height;
    x += kOctet;
  }

  // Starts to copy it from a tensor of one image and head; zeros outside.
  __device__ void copy(Tile<T> tile, const T* base, int64_t stride, int grid_width) const {
    const int64_t item = is_inside() ? int64_t(y) * grid_width + x : 0;
    copy_async(tile.chunk(slot, chunk), base + item * stride + chunk * Tile<T>::kPerChunk, is_inside());
  }

  // Writes rows[y] + columns[x], from lines of 32 channels; nothing outside.
  __device__ void build(Tile<T> tile, const T* rows, const T* columns) const {
    const int first = chunk * Tile<T>::kPerChunk;
    if (is_inside()) write_sum(tile.chunk(slot, chunk), rows + y * kWidth + first, columns + x * kWidth + first);
  }
};

// Starts to copy so many lines of a tensor, one after the other, as they are.
template <typename T>
__device__ __forceinline__ void load_lines(T* lines, const T* base, int64_t stride, int count) {
  for (int i = threadIdx.x; i < count * Tile<T>::kChunks; i += kGroupThreads) {
    const int line = i / Tile<T>::kChunks, channel = i % Tile<T>::kChunks * Tile<T>::kPerChunk;
    copy_async(lines + line * kWidth + channel, base + line * stride + channel, true);
  }
}

// Starts sum[64, 64] = left[64, 32] · tileᵀ, or += it.
template <bool kAdds, typename T>
__device__ __forceinline__ void multiply_rows_async(float (&sum)[8][4], const Fragment<T>& left, Matrix tile) {
  constexpr int kStep = 16 * sizeof(T);
  multiply_async<T, false, kAdds>(sum, left.part[0], tile.description());
  multiply_async<T, false, true>(sum, left.part[1], tile.from(kStep).description());
}

// Starts sum[64, 32] += left[64, 64] · tile.
template <typename T>
__device__ __forceinline__ void multiply_columns_async(float (&sum)[4][4], const uint32_t (&left)[4][4], Matrix tile) {
  constexpr int kStep = 16 * kWidth * sizeof(T);
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    multiply_async<T, true, true>(sum, left[group], tile.from(group * kStep).description());
  }
}

template <typename T>
constexpr int64_t hopper_bytes(int64_t lines) {  // of rows and columns
  return (2 * kGroups + 6) * Tile<T>::kBytes + lines * kWidth * int64_t(sizeof(T));
}

// A block has 128 queries of one head of one image, a warpgroup 64 of them; keys go by in tiles, two in flight.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kGroupThreads, 2) hopper_forward_kernel(Problem<T> p, T* out, float* lse) {
#if defined(CONDDETR_HAS_WARPGROUPS)
  const int first = blockIdx.x * kGroupQueries, head = blockIdx.y, image = blockIdx.z;
  const Octets octets = p.octets(image);
  const int tiles = octets.tiles(), whole_tiles = octets.valid.width / kOctet * octets.valid.height / kTileOctets;
  const Lane lane;
  // Of the last block's two warpgroups one may have no query. It copies, and waits at barriers.
  const bool is_idle = first + lane.first_row() / kTile * kTile >= p.queries;
  Shared shared;
  const Tile<T> q_content = shared.tile<T>(kGroups), q_spatial = shared.tile<T>(kGroups);
  const Tile<T> keys = shared.tile<T>(2), values = shared.tile<T>(2), spatial = shared.tile<T>(2);
  T* rows = shared.take<T>(kSeparable ? octets.valid.height * kWidth : 0);
  T* columns = shared.take<T>(0);
  const T *k_content = p.k_content.of(image, head), *v = p.v.of(image, head), *k_spatial = p.spatial.of(image, head);
  Chunk<T> chunk(octets);
  const auto load = [&](int tile) {
    chunk.copy(stage(keys, tile % 2), k_content, p.k_content.item, p.width);
    chunk.copy(stage(values, tile % 2), v, p.v.item, p.width);
    if constexpr (!kSeparable) chunk.copy(stage(spatial, tile % 2), k_spatial, p.spatial.item, p.width);
  };

  load_queries<kGroupQueries>(q_content, p.q_content.of(image, head), p.q_content.item, first, p.queries);
  load_queries<kGroupQueries>(q_spatial, p.q_spatial.of(image, head), p.q_spatial.item, first, p.queries);
  if constexpr (kSeparable) {
    load_lines(rows, k_spatial, p.spatial.item, octets.valid.height);
    load_lines(columns, p.columns.of(image, head), p.columns.item, octets.valid.width);
  }
  load(0);
  end_group();
  wait_group<0>();
  barrier();
  Fragment<T> content(q_content, lane.first_row()), conditional(q_spatial, lane.first_row());
  const uint32_t sign = p.log2_scale < 0 ? 0x80008000u : 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) content.part[i / 4][i % 4] ^= sign, conditional.part[i / 4][i % 4] ^= sign;
  if constexpr (kSeparable) chunk.build(spatial, rows, columns);

  Softmax<true, kSeries> softmax;
  float sums[4][4];
  clear(sums);
  const Matrix key_matrix(keys), value_matrix(values), spatial_matrix(spatial);
  for (int tile = 0; tile < tiles; ++tile) {
    wait_group<0>();
    show_to_products();
    barrier();  // this tile is there, and nobody reads the other
    if (tile + 1 < tiles) {
      chunk.next();
      load(tile + 1);
      if constexpr (kSeparable) chunk.build(stage(spatial, (tile + 1) % 2), rows, columns);
    }
    end_group();
    if (is_idle) continue;

    const int offset = tile % 2 * Tile<T>::kBytes;
    float weights[8][4];
    begin_products(weights, content.part, conditional.part);
    multiply_rows_async<false>(weights, content, key_matrix.from(offset));
    multiply_rows_async<true>(weights, conditional, spatial_matrix.from(offset));
    finish_products(weights);

    if (p.padding || tile >= whole_tiles) hide(weights, visible_keys(p, image, octets, tile), -INFINITY, lane);
    softmax.update(weights, fabsf(p.log2_scale));
    settle(weights);  // or the compiler has two copies of them, with dropout and without
    if (p.keep) drop(weights, p, image, head, first, tile, lane);

    uint32_t packed[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      packed[i / 4][i % 4] = pack<T>(weights[i / 2][2 * (i % 2)], weights[i / 2][2 * (i % 2) + 1]);
      sums[i / 4][i % 4] *= softmax.shrink[i / 2 % 2];
    }
    begin_products(sums, packed);
    multiply_columns_async<T>(sums, packed, value_matrix.from(offset));
    finish_products(sums);
  }
  if (!is_idle) store_forward(out, lse, sums, softmax, p, image, head, first, q_content, lane);
#endif
}

}  // namespace conddetr::attn
