// The threads of a block on a CPU, one block at a time.
//
// Every thread of a block is a fiber that runs until it waits for its warp or its block. Warps and lanes run in random
// order, shared memory starts as NaN, and an asynchronous copy happens at a random moment between its start and the
// wait for it. A missing barrier or wait gives wrong numbers in some runs; a barrier that some threads never reach ends
// the program.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 blockIdx, threadIdx;

namespace conddetr {

constexpr int kLanes = 32;

namespace emulator {

// Threads that wait for each other, and the values that they exchange; two generations, for threads that read late.
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
  std::vector<char*> written;     // chunks of shared memory that copies wrote; see hopper.cuh
  std::vector<Product> products;  // unfinished products; see hopper.cuh
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

// Exchanges values in the warp: returns each lane's, [lane][16 bytes].
inline const char (*show(const void* value, size_t bytes))[16] {
  Team& team = warp();
  char (*shown)[16] = team.shown[team.generation % 2];
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
  for (bool is_running = true; is_running;) {
    is_running = false;
    bool is_stuck = true;
    std::shuffle(order.begin(), order.end(), random_numbers);
    for (int index : order) {
      Thread& thread = block->threads[index];
      if (thread.is_done) continue;
      is_running = true;
      if (thread.waits_for && thread.waits_for->generation == thread.generation) continue;
      is_stuck = false;
      threadIdx.x = index;
      swapcontext(&block->scheduler, &thread.context);
    }
    if (is_running && is_stuck) {
      fprintf(stderr, "emulator: threads wait at a barrier that others never reach\n");
      abort();
    }
  }
}

inline void start_copy(void* shared, const void* global, size_t bytes, bool inside) {
  const Copy copy{shared, global, bytes, inside, self().group};
  if (random_numbers() % 2) {
    carry_out(copy);
  } else {
    self().copies.push_back(copy);
  }
}

}  // namespace emulator

}  // namespace conddetr
