// Replaces csrc/common/hopper.cuh: products by a warpgroup on a CPU, as the PTX ISA 9.0 documents them (9.7.15).
//
// A product reads shared memory at its matrix description's addresses, as of the last `show_to_products`. It happens at
// a random moment between its start and `wait_products`, so code that does not wait reads old numbers.
#pragma once

#include <array>

#include "common/warp.cuh"

#define CONDDETR_HAS_WARPGROUPS

namespace conddetr {

namespace emulator {

constexpr uint32_t kSharedStart = 1024;  // where a block's dynamic shared memory starts on Hopper

[[noreturn]] inline void refuse(const char* why) {
  fprintf(stderr, "emulator: %s\n", why);
  abort();
}

// A matrix description (9.7.15.5.1.2.2), and the addresses of its numbers in the canonical layouts (9.7.15.5.1.2.1.3).
struct Description {
  uint32_t start, leading, stride, chunks;  // in bytes; chunks of 16 bytes in a row of the swizzle's pattern

  explicit Description(uint64_t bits)
      : start((bits & 0x3FFF) << 4), leading((bits >> 16 & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4) {
    constexpr uint32_t kChunks[4] = {1, 8, 4, 2};
    chunks = kChunks[bits >> 62];
    if (bits & 0x3FFFC000C000C000) refuse("a matrix description with reserved bits, or a base offset");
  }

  // Number `column` of row `row`: rows are columns of b in K-major matrices, and rows of b in N-major ones.
  uint32_t address(int row, int column, bool is_n_major) const {
    const uint32_t chunk = column / 8;
    uint32_t result = start + row % 8 * chunks * 16 + column % 8 * 2;
    if (chunks == 1) {
      result += is_n_major ? row / 8 * leading + chunk * stride : row / 8 * stride + chunk * leading;
    } else {
      result += row / 8 * stride + (is_n_major ? chunk % chunks * 16 + chunk / chunks * leading : chunk * 16);
    }
    return result ^ (result >> 7 & (chunks - 1)) << 4;
  }

  uint16_t number(int row, int column, bool is_n_major) const {
    const uint32_t offset = address(row, column, is_n_major) - kSharedStart;
    if (offset + 2 > block->shared.size() - 512) refuse("a product reads outside shared memory");
    uint16_t bits;
    memcpy(&bits, block->shown_to_products.data() + (shared_memory() - block->shared.data()) + offset, sizeof bits);
    return bits;
  }
};

// Carries out the products of groups before `groups`, in the order in which they were started.
inline void finish_products(int groups) {
  auto& products = self().products;
  size_t count = 0;
  for (; count < products.size() && products[count].group < groups; ++count) products[count].carry_out();
  products.erase(products.begin(), products.begin() + count);
}

}  // namespace emulator

inline uint32_t shared_address(const void* pointer) {
  return emulator::kSharedStart + uint32_t(static_cast<const char*>(pointer) - shared_memory());
}

inline void show_to_products() {
  for (const char* chunk : emulator::self().written) {
    const size_t offset = chunk - emulator::block->shared.data();
    memcpy(emulator::block->shown_to_products.data() + offset, chunk, 16);
  }
  emulator::self().written.clear();
}

template <typename Registers>
void settle(Registers&) {}

template <typename... Registers>
void begin_products(Registers&...) {
  emulator::self().may_multiply = true;
}

inline void end_products() { ++emulator::self().product_group; }

template <int Pending, typename... Registers>
void wait_products(Registers&...) {
  emulator::finish_products(emulator::self().product_group - Pending);
  emulator::self().may_multiply = false;
}

namespace emulator {

// `left` returns rows g and g + 8 of `a`: (0 or 1, column) → float.
template <typename T, bool Turned, bool Adds, int N, typename Left>
void start_product(float (&sum)[N][4], Left left, uint64_t b) {
  Thread& thread = self();
  if (!thread.may_multiply) refuse("a product without begin_products before it");
  if (memcmp(show(&b, sizeof b)[0], &b, sizeof b)) refuse("lanes describe different matrices");
  const int t = threadIdx.x % 4;
  const auto carry_out = [=, &sum] {
    const Description right(b);
    for (int i = 0; i < 4 * N; ++i) {
      float& result = sum[i / 4][i % 4];
      const int row = i / 2 % 2, column = i / 4 * 8 + 2 * t + i % 2;
      if (!Adds) result = 0;
      for (int k = 0; k < 16; ++k) {
        const uint16_t bits = Turned ? right.number(k, column, true) : right.number(column, k, false);
        result += left(row, k) * to_float(T(bits, T::from_bits()));
      }
    }
  };
  thread.products.push_back({thread.product_group, carry_out});
  meet(block->groups[threadIdx.x / kGroup]);  // all four warps start it
  if (random_numbers() % 2) finish_products(thread.product_group + 1);
}

}  // namespace emulator

template <typename T, bool Turned, bool Adds, int N>
void multiply_async(float (&sum)[N][4], const uint32_t (&a)[4], uint64_t b) {
  const int g = threadIdx.x % kLanes / 4;
  std::array<std::array<float, 16>, 2> left;  // rows g and g + 8
  const auto shown = emulator::show(a, sizeof a);
  for (int from = 0; from < 4; ++from) {
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = reinterpret_cast<const uint16_t*>(shown[4 * g + from])[i];
      left[i / 2 % 2][i / 4 * 8 + 2 * from + i % 2] = to_float(T(bits, T::from_bits()));
    }
  }
  emulator::start_product<T, Turned, Adds>(sum, [=](int row, int k) { return left[row][k]; }, b);
}

template <typename T, bool Adds, int N>
void multiply_async(float (&sum)[N][4], uint64_t a, uint64_t b) {
  if (memcmp(emulator::show(&a, sizeof a)[0], &a, sizeof a)) emulator::refuse("lanes describe different matrices");
  const int first = threadIdx.x % emulator::kGroup / kLanes * 16 + threadIdx.x % kLanes / 4;
  const auto left = [=](int row, int k) {
    return to_float(T(emulator::Description(a).number(first + 8 * row, k, false), T::from_bits()));
  };
  emulator::start_product<T, false, Adds>(sum, left, b);
}

}  // namespace conddetr
