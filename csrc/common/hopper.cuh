// The instructions that only Hopper has (sm_90a), for attn/cuda/hopper: products by a warpgroup, four warps that start
// at a multiple of four. As with warp.cuh, tests without a GPU use another header of this name. Section numbers refer
// to the PTX ISA, version 9.0.
#pragma once

#include <type_traits>

#include "common/warp.cuh"

// Defined where these instructions can be compiled; elsewhere a kernel that uses them is empty.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CONDDETR_HAS_WARPGROUPS
#endif

namespace conddetr {

// Products read shared memory through the async proxy (9.7.15.4). This orders the thread's writes there, including
// finished copies, before the products' reads; a barrier must follow.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The compiler cannot see that products use registers asynchronously: no computation of these values moves past here.
template <int N>
__device__ __forceinline__ void settle(float (&values)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+f"(values[i / 4][i % 4])::"memory");
}
template <int N>
__device__ __forceinline__ void settle(uint32_t (&values)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+r"(values[i / 4][i % 4])::"memory");
}

// Required before products that use these registers, except for the second and later products with the same sum
// (9.7.15.7.1).
template <typename... Registers>
__device__ __forceinline__ void begin_products(Registers&... registers) {
  (settle(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends a group of products.
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all products except those of the last `Pending` groups; these registers may be used then.
template <int Pending, typename... Registers>
__device__ __forceinline__ void wait_products(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  (settle(registers), ...);
}

#define CONDDETR_SUM(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
#define CONDDETR_4_SUMS CONDDETR_SUM(0), CONDDETR_SUM(1), CONDDETR_SUM(2), CONDDETR_SUM(3)
#define CONDDETR_8_SUMS CONDDETR_4_SUMS, CONDDETR_SUM(4), CONDDETR_SUM(5), CONDDETR_SUM(6), CONDDETR_SUM(7)
#define CONDDETR_16_NAMES "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define CONDDETR_32_NAMES \
  CONDDETR_16_NAMES ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
// One instruction, for numbers of type T.
#define CONDDETR_MULTIPLY(shape, operands, sums, ...)                                                               \
  if constexpr (std::is_same_v<T, bf16>) {                                                                          \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".f32.bf16.bf16 " operands : sums : __VA_ARGS__ : "memory"); \
  } else {                                                                                                          \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".f32.f16.f16 " operands : sums : __VA_ARGS__ : "memory");   \
  }

// Starts sum = a b, or with `Adds` sum += a b, for a [64, 16], b [16, 8n] and sum [64, 8n], in four warps of 16 rows.
// Lane 4g + t holds, for each octet of columns of `sum`, columns 2t and 2t+1 of row g, then of row g + 8
// (9.7.15.5.1.1.1, figure 149); of `a` the pairs that `multiply` of warp.cuh takes (figure 148). `b` is the descriptor
// of a matrix in shared memory (9.7.15.5.1.2.2) whose rows are columns of b, 16 numbers of each (K-major), or with
// `Turned` 16 rows of b (N-major).
template <typename T, bool Turned, bool Adds>
__device__ __forceinline__ void multiply_async(float (&sum)[8][4], const uint32_t (&a)[4], uint64_t b) {
  CONDDETR_MULTIPLY("m64n64k16", "{" CONDDETR_32_NAMES "}, {%32, %33, %34, %35}, %36, %37, 1, 1, %38;", CONDDETR_8_SUMS,
                    "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(Adds)), "n"(int(Turned)))
}

template <typename T, bool Turned, bool Adds>
__device__ __forceinline__ void multiply_async(float (&sum)[4][4], const uint32_t (&a)[4], uint64_t b) {
  CONDDETR_MULTIPLY("m64n32k16", "{" CONDDETR_16_NAMES "}, {%16, %17, %18, %19}, %20, %21, 1, 1, %22;", CONDDETR_4_SUMS,
                    "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(Adds)), "n"(int(Turned)))
}

// The same if `a` is a descriptor too, K-major.
template <typename T, bool Adds>
__device__ __forceinline__ void multiply_async(float (&sum)[8][4], uint64_t a, uint64_t b) {
  CONDDETR_MULTIPLY("m64n64k16", "{" CONDDETR_32_NAMES "}, %32, %33, %34, 1, 1, 0, 0;", CONDDETR_8_SUMS, "l"(a), "l"(b),
                    "n"(int(Adds)))
}

#undef CONDDETR_MULTIPLY
#undef CONDDETR_32_NAMES
#undef CONDDETR_16_NAMES
#undef CONDDETR_8_SUMS
#undef CONDDETR_4_SUMS
#undef CONDDETR_SUM

}  // namespace conddetr
