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

#include "attn/forward.cuh"
#include "common/hopper.cuh"

namespace conddetr::attn {

constexpr int kGroups = 2;  // warpgroups of a block
constexpr int kGroupQueries = kGroups * kTile;
constexpr int kGroupThreads = kGroups * kThreads;

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

template <typename T, bool kSeparable>
constexpr int64_t hopper_forward_bytes(int64_t height, int64_t width) {
  return (2 * kGroups + 6) * Tile<T>::kBytes + (kSeparable ? line_bytes<T>(height, width) : 0);
}

// A block has 128 queries of one head of one image, a warpgroup 64 of them; keys go by in tiles, two in flight.
template <typename T, bool kSeparable>
__global__ void __launch_bounds__(kGroupThreads, 2) hopper_forward_kernel(Problem<T> p, T* out, float* lse) {
#if defined(CONDDETR_HAS_WARPGROUPS)
  const int first = blockIdx.x * kGroupQueries, head = blockIdx.y, image = blockIdx.z;
  const Keys keys = p.keys_of(image);
  const int tiles = keys.tiles();
  const Lane lane;
  // Of the last block's two warpgroups one may have no query. It copies, and waits at barriers.
  const bool is_idle = first + lane.first_row() / kTile * kTile >= p.queries;
  Shared shared;
  const Tile<T> q_content = shared.tile<T>(kGroups), q_spatial = shared.tile<T>(kGroups);
  KeyTiles<T, kSeparable, kGroupThreads> key_tiles(p, image, head, keys, shared);

  load_queries<kGroupQueries>(q_content, p.q_content.of(image, head), p.q_content.item, first, p.queries);
  load_queries<kGroupQueries>(q_spatial, p.q_spatial.of(image, head), p.q_spatial.item, first, p.queries);
  key_tiles.begin(image, head);
  end_group();
  wait_group<0>();
  barrier();
  Fragment<T> content(q_content, lane.first_row()), conditional(q_spatial, lane.first_row());
  const uint32_t sign = p.log2_scale < 0 ? 0x80008000u : 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) content.part[i / 4][i % 4] ^= sign, conditional.part[i / 4][i % 4] ^= sign;
  key_tiles.finish_first();

  Softmax<true> softmax;
  float sums[4][4];
  clear(sums);
  const Matrix key_matrix(key_tiles.content), value_matrix(key_tiles.values), spatial_matrix(key_tiles.spatial);
  for (int tile = 0; tile < tiles; ++tile) {
    wait_group<0>();
    show_to_products();
    barrier();  // this tile is there, and nobody reads the other
    if (tile + 1 < tiles) key_tiles.load(tile + 1);
    end_group();
    if (is_idle) continue;

    const Kept kept(p, image, head, first, tile, lane);
    const int offset = tile % 2 * Tile<T>::kBytes;
    float weights[8][4];
    begin_products(weights, content.part, conditional.part);
    multiply_rows_async<false>(weights, content, key_matrix.from(offset));
    multiply_rows_async<true>(weights, conditional, spatial_matrix.from(offset));
    finish_products(weights);

    const Visible visible(p, image, keys, tile, lane);
    if (!visible.is_all) visible.hide(weights, -INFINITY);
    softmax.update(weights, fabsf(p.log2_scale));
    uint32_t packed[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      packed[i / 4][i % 4] = pack<T>(weights[i / 2][2 * (i % 2)], weights[i / 2][2 * (i % 2) + 1]);
      sums[i / 4][i % 4] *= softmax.shrink[i / 2 % 2];
    }
    if (p.keep) kept.apply(packed);
    begin_products(sums, packed);
    multiply_columns_async<T>(sums, packed, value_matrix.from(offset));
    finish_products(sums);
  }
  if (!is_idle) store_forward(out, lse, sums, softmax, p, image, head, first, q_content, lane);
#endif
}

}  // namespace conddetr::attn
