// The weights that count: visible keys, and weights that dropout keeps.
#pragma once

#include "attn/cuda/problem.cuh"

namespace conddetr::attn {

__device__ __forceinline__ bool has_bit(uint32_t bits, int index) { return bits >> index & 1; }

template <typename T>
__device__ __forceinline__ bool is_visible(const Problem<T>& p, int image, const Keys& keys, int ordinal) {
  return ordinal < keys.count() && !(p.padding && p.padding[int64_t(image) * p.keys + keys.item(ordinal)]);
}

// The visible keys of a tile, for a warp whose rows are queries. All its lanes take part.
struct Visible {
  bool is_all;
  uint32_t words[2];  // of the halves of the tile, from key 2t on

  template <typename T>
  __device__ __forceinline__ Visible(const Problem<T>& p, int image, const Keys& keys, int tile, const Lane& lane)
      : is_all(!p.padding && keys.is_whole(tile)), words{~0u, ~0u} {
    if (is_all) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int ordinal = tile * kTile + kLanes * half + threadIdx.x % kLanes;
      words[half] = ballot(is_visible(p, image, keys, ordinal)) >> 2 * lane.t;
    }
  }

  // Whether key 8 · octet + 2t + column is visible.
  __device__ bool has(int octet, int column) const {
    return has_bit(octet < 4 ? words[0] : words[1], octet % 4 * 8 + column);
  }

  __device__ __forceinline__ void hide(float (&scores)[8][4], float hidden) const {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (!has(i / 4, i % 2)) scores[i / 4][i % 4] = hidden;
    }
  }
};

// Bits of a lane's weights in one tile of keys, rows g and g + 8 being queries.
struct Kept {
  uint32_t words[2][2];  // of row and half of the tile

  // Shifts the words to the lane's key 2t. Separate from the loads, which have a latency.
  __device__ __forceinline__ void start_at(int key) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i / 2][i % 2] >>= key;
  }

  // Whether the weight of key 8 · octet + 2t + column is kept.
  __device__ bool has(int row, int octet, int column) const {
    return has_bit(octet < 4 ? words[row][0] : words[row][1], octet % 4 * 8 + column);
  }

  // Zeroes the dropped ones of packed weights, [octet / 2][octet % 2 · 2 + row]. Bits of two neighbours become the
  // signs of bytes, and these become a mask of 32 bits.
  __device__ __forceinline__ void apply(uint32_t (&packed)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int octet = i / 2, row = i % 2, byte = octet % 4;
      const uint32_t word = words[row][octet / 4];
      packed[octet / 2][octet % 2 * 2 + row] &= signs_of_bytes(word << 7, word << 6, byte);
    }
  }
};

// Reads the bits, tile after tile.
struct KeptOfKeys {
  const uint32_t* words[2];  // of both rows
  bool has_dropout;
  int queries;

  template <typename T>
  __device__ KeptOfKeys(const Problem<T>& p, int image, int head, int first, const Lane& lane)
      : has_dropout(p.keep), queries(p.queries) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int query = first + lane.first_row() + lane.g + 8 * row;
      words[row] = p.keep_of(image, head, 0) + (query < queries ? query : queries - 1);
    }
  }

  __device__ __forceinline__ Kept next() {
    Kept kept{{{~0u, ~0u}, {~0u, ~0u}}};
    if (!has_dropout) return kept;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      kept.words[row][0] = words[row][0];
      kept.words[row][1] = words[row][queries];
      words[row] += 2 * queries;
    }
    return kept;
  }
};

}  // namespace conddetr::attn
