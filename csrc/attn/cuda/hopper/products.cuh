// Products of tiles on Hopper, for 16-bit numbers: a warpgroup, which is a block, multiplies its 64 rows with a tile in
// shared memory. That reads the tile once, where warps would read it four times: 8 KiB for 16 rows at 128 bytes a clock
// take as long as the exponentials.
//
// Tiles are copied as everywhere, 16 bytes at a time by all threads. cp.async.bulk copies bytes in order, but a row of
// 64 bytes must be swizzled. cp.async.bulk.tensor swizzles, but needs a map that the driver encodes for every call, and
// would fetch keys outside the valid rectangle, where this code writes zeros.
#pragma once

#include "attn/cuda/products.cuh"
#include "common/hopper.cuh"

namespace conddetr::attn {

// A tile's descriptor for products (PTX ISA 9.0, 9.7.15.5.1.2.2): a matrix in rows of 64 bytes, with the swizzle of 64
// bytes. The swizzle depends on address bits, so its pattern starts at multiples of 512, as tiles do, and a product may
// start at any chunk of any eighth row.
//   bits 0-13   address / 16
//   bits 16-29  leading dimension: from one pattern of 64 bytes to the next; there is only one, encoded as 1
//   bits 32-45  stride dimension: from eight rows to the next, 512 bytes / 16
//   bits 62-63  2: swizzle of 64 bytes
struct Matrix {
  uint32_t low;

  template <typename T>
  __device__ explicit Matrix(Tile<T> tile) : low((shared_address(tile.data) & 0x3FFFF) >> 4 | 1 << 16) {
    static_assert(kWidth * sizeof(T) == 64);
  }

  // The same matrix, starting this many bytes later.
  __device__ Matrix from(int bytes) const {
    Matrix moved = *this;
    moved.low += bytes >> 4;
    return moved;
  }
  __device__ uint64_t description() const { return uint64_t(2u << 30 | 512 >> 4) << 32 | low; }
};

// Starts sum[64, 64] = left[64, 32] · tileᵀ, or += it.
template <bool kAdds, typename T>
__device__ __forceinline__ void multiply_rows_async(float (&sum)[8][4], const Fragment<T>& left, Tile<T> tile) {
  constexpr int kStep = 16 * sizeof(T);
  const Matrix matrix(tile);
  multiply_async<T, false, kAdds>(sum, left.part[0], matrix.description());
  multiply_async<T, false, true>(sum, left.part[1], matrix.from(kStep).description());
}

// The same for 64 rows in shared memory, which need no registers.
template <bool kAdds, typename T>
__device__ __forceinline__ void multiply_rows_async(float (&sum)[8][4], Tile<T> left, Tile<T> tile) {
  constexpr int kStep = 16 * sizeof(T);
  const Matrix a(left), b(tile);
  multiply_async<T, kAdds>(sum, a.description(), b.description());
  multiply_async<T, true>(sum, a.from(kStep).description(), b.from(kStep).description());
}

// Starts sum[64, 32] += left[64, 64] · tile.
template <typename T>
__device__ __forceinline__ void multiply_columns_async(float (&sum)[4][4], const uint32_t (&left)[4][4], Tile<T> tile) {
  constexpr int kStep = 16 * kWidth * sizeof(T);
  const Matrix matrix(tile);
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    multiply_async<T, true, true>(sum, left[group], matrix.from(group * kStep).description());
  }
}

// Packs sums as the left operand of the next product.
template <typename T>
__device__ __forceinline__ void pack_all(uint32_t (&packed)[4][4], const float (&values)[8][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    packed[i / 4][i % 4] = pack<T>(values[i / 2][2 * (i % 2)], values[i / 2][2 * (i % 2) + 1]);
  }
}

}  // namespace conddetr::attn
