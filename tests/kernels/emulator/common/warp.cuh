// Replaces csrc/common/warp.cuh: the same instructions on a CPU, so that the CUDA kernels run unchanged in tests.
// fibers.h has the threads.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "fibers.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct float2 {
  float x, y;
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace conddetr {

using bf16 = c10::BFloat16;
using fp16 = c10::Half;

template <typename T>
float to_float(T value) {
  return float(value);
}
template <typename T>
T from_float(float value) {
  return T(value);
}
template <typename T>
uint32_t pack(float first, float second) {
  return T(first).x | uint32_t(T(second).x) << 16;
}

inline float exp2_fast(float x) { return exp2f(x); }

template <typename T>
uint4 sum_of(const T* a, const T* b) {
  T sums[16 / sizeof(T)];
  for (int i = 0; i < 16 / int(sizeof(T)); ++i) sums[i] = T(float(a[i]) + float(b[i]));
  uint4 result;
  memcpy(&result, sums, sizeof result);
  return result;
}
template <typename T>
void write_chunk(T* shared, uint4 chunk) {
  memcpy(shared, &chunk, sizeof chunk);
  emulator::self().written.push_back(reinterpret_cast<char*>(shared));
}

inline uint32_t signs_of_bytes(uint32_t low, uint32_t high, int byte) {
  const auto sign = [=](uint32_t word) { return 0 - (word >> (8 * byte + 7) & 1); };
  return (sign(low) & 0xFFFF) | (sign(high) & 0xFFFF0000);
}

inline void barrier() { emulator::meet(emulator::block->all); }
inline void warp_barrier() { emulator::meet(emulator::warp()); }

template <typename V>
V from_lane(V value, int lane) {
  V result;
  memcpy(&result, emulator::show(&value, sizeof value)[lane], sizeof result);
  return result;
}
template <typename V>
V from_lane_xor(V value, int mask) {
  return from_lane(value, int(threadIdx.x % kLanes) ^ mask);
}
inline uint32_t ballot(bool is_set) {
  const auto shown = emulator::show(&is_set, sizeof is_set);
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t(shown[lane][0]) << lane;
  return bits;
}

inline char* shared_memory() {
  const uintptr_t start = reinterpret_cast<uintptr_t>(emulator::block->shared.data());
  return reinterpret_cast<char*>((start + 511) / 512 * 512);
}

inline void copy_async(void* shared, const void* global, bool inside) {
  emulator::start_copy(shared, global, 16, inside);
}
inline void copy_word_async(void* shared, const void* global, bool inside) {
  emulator::start_copy(shared, global, 4, inside);
}
inline void end_group() { ++emulator::self().group; }
template <int Pending>
void wait_group() {
  emulator::finish_copies(emulator::self(), emulator::self().group - Pending);
}

template <bool Turned>
void load_matrices(uint32_t (&result)[4], const void* row) {
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const auto shown = emulator::show(&row, sizeof row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto number = [&](int in_row, int column) {
      const uint16_t* numbers;
      memcpy(&numbers, shown[8 * matrix + in_row], sizeof numbers);
      return uint32_t(numbers[column]);
    };
    result[matrix] =
        Turned ? number(2 * t, g) | number(2 * t + 1, g) << 16 : number(g, 2 * t) | number(g, 2 * t + 1) << 16;
  }
  warp_barrier();
}

template <typename T>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  float left[16][16], right[16][8];
  const auto unpack = [](const char* shown, int word, int half) {
    return to_float(T(reinterpret_cast<const uint16_t*>(shown)[2 * word + half], T::from_bits()));
  };
  const auto shown_a = emulator::show(a, sizeof a);
  for (int from = 0; from < kLanes; ++from) {
    for (int i = 0; i < 8; ++i) {
      left[from / 4 + i / 2 % 2 * 8][2 * (from % 4) + i % 2 + i / 4 * 8] = unpack(shown_a[from], i / 2, i % 2);
    }
  }
  const uint32_t b[2] = {b0, b1};
  const auto shown_b = emulator::show(b, sizeof b);
  for (int from = 0; from < kLanes; ++from) {
    for (int i = 0; i < 4; ++i) {
      right[2 * (from % 4) + i % 2 + i / 2 * 8][from / 4] = unpack(shown_b[from], i / 2, i % 2);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) sum[i] += left[g + i / 2 * 8][k] * right[k][2 * t + i % 2];
  }
}

}  // namespace conddetr
