// Stands in for csrc/common/warp.cuh: the same instructions on a CPU, so that the CUDA kernels run, unchanged, in tests.
//
// Every thread of a block is a fiber that runs until it waits for its warp or its block; warps and lanes take turns in
// random order, shared memory starts as NaN, and an asynchronous copy happens at a random moment between its start and
// the wait for it. A missing barrier or wait then gives wrong numbers, sooner or later; a barrier that some threads
// never reach ends the program.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

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
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 blockIdx, threadIdx;

namespace conddetr {

using bf16 = c10::BFloat16;
using fp16 = c10::Half;

constexpr int kLanes = 32;

namespace emulator {

// Threads that wait for each other, and what they show each other; two generations, for those that still look.
struct Team {
  int size = 0, arrived = 0, generation = 0;
  char shown[2][kLanes][16];
};

struct Copy {
  void* shared;
  const void* global;
  size_t bytes;
  bool inside;
  int group;
};

struct Product {
  int group;
  std::function<void()> carry_out;
};

constexpr size_t kStack = 64 * 1024;
constexpr int kGroup = 128;  // threads of a warpgroup

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  std::vector<Copy> copies;
  int group = 0;
  std::vector<char*> written;                    // chunks of shared memory, by copies; see hopper.cuh
  std::vector<Product> products;                 // not yet finished; see hopper.cuh
  int product_group = 0;
  bool may_multiply = false;
  const Team* waits_for = nullptr;
  int generation = 0;
  bool is_done = false;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Team> warps, groups;
  Team all;
  std::vector<char> shared, shown_to_products;
  std::function<void()> kernel;
  ucontext_t scheduler;
};

inline std::unique_ptr<Block> block;
inline std::mt19937 random_numbers(1);

inline Thread& self() { return block->threads[threadIdx.x]; }
inline Team& warp() { return block->warps[threadIdx.x / kLanes]; }

inline void meet(Team& team) {
  Thread& thread = self();
  thread.generation = team.generation;
  if (++team.arrived == team.size) {
    team.arrived = 0;
    ++team.generation;
  }
  thread.waits_for = &team;
  swapcontext(&thread.context, &block->scheduler);
}

// What each lane of the warp shows, [lane][16 bytes].
inline const char (*show(const void* value, size_t bytes))[16] {
  Team& team = warp();
  char(*shown)[16] = team.shown[team.generation % 2];
  memcpy(shown[threadIdx.x % kLanes], value, bytes);
  meet(team);
  return shown;
}

inline void carry_out(const Copy& copy) {
  if (reinterpret_cast<uintptr_t>(copy.shared) % copy.bytes || reinterpret_cast<uintptr_t>(copy.global) % copy.bytes) {
    fprintf(stderr, "emulator: a copy is not aligned to its %zu bytes\n", copy.bytes);
    abort();
  }
  if (copy.inside) {
    memcpy(copy.shared, copy.global, copy.bytes);
  } else {
    memset(copy.shared, 0, copy.bytes);
  }
  if (copy.bytes == 16) self().written.push_back(static_cast<char*>(copy.shared));
}

inline void finish_copies(Thread& thread, int groups) {
  std::erase_if(thread.copies, [&](const Copy& copy) {
    if (copy.group >= groups) return false;
    carry_out(copy);
    return true;
  });
}

inline void run_thread() {
  block->kernel();
  self().is_done = true;
  swapcontext(&self().context, &block->scheduler);
}

inline void run_block(int threads, size_t shared, std::function<void()> kernel) {
  block = std::make_unique<Block>();
  block->threads = std::vector<Thread>(threads);
  block->warps = std::vector<Team>(threads / kLanes);
  block->groups = std::vector<Team>(threads / kGroup);
  block->shared.assign(shared + 512, char(0xFF));
  block->shown_to_products = block->shared;
  block->kernel = std::move(kernel);
  block->all.size = threads;
  for (Team& team : block->warps) team.size = kLanes;
  for (Team& team : block->groups) team.size = kGroup;
  for (Thread& thread : block->threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, run_thread, 0);
  }
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    bool is_stuck = true;
    std::shuffle(order.begin(), order.end(), random_numbers);
    for (int index : order) {
      Thread& thread = block->threads[index];
      if (thread.is_done) continue;
      goes_on = true;
      if (thread.waits_for && thread.waits_for->generation == thread.generation) continue;
      is_stuck = false;
      threadIdx.x = index;
      swapcontext(&block->scheduler, &thread.context);
    }
    if (goes_on && is_stuck) {
      fprintf(stderr, "emulator: threads wait for others that never come\n");
      abort();
    }
  }
}

}  // namespace emulator

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

namespace emulator {

inline void start_copy(void* shared, const void* global, size_t bytes, bool inside) {
  const Copy copy{shared, global, bytes, inside, self().group};
  if (random_numbers() % 2) {
    carry_out(copy);
  } else {
    self().copies.push_back(copy);
  }
}

}  // namespace emulator

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
      const uint16_t* found;
      memcpy(&found, shown[8 * matrix + in_row], sizeof found);
      return uint32_t(found[column]);
    };
    result[matrix] = Turned ? number(2 * t, g) | number(2 * t + 1, g) << 16 : number(g, 2 * t) | number(g, 2 * t + 1) << 16;
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
    for (int i = 0; i < 4; ++i) right[2 * (from % 4) + i % 2 + i / 2 * 8][from / 4] = unpack(shown_b[from], i / 2, i % 2);
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) sum[i] += left[g + i / 2 * 8][k] * right[k][2 * t + i % 2];
  }
}

}  // namespace conddetr
