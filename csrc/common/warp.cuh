// The GPU instructions of the CUDA kernels. Kernels use only these and plain C++, so that tests can run the same
// kernels on a CPU with another header of this name (tests/kernels/emulator).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace conddetr {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kLanes = 32;

// 2^x in one instruction; relative error below 2^-22, denormal results are zero, 2^-inf = 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(fp16 value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  return T(value);
}

// Two numbers in the order of memory, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// a[i] + b[i] for 16 bytes of numbers, each rounded once.
template <typename T>
__device__ __forceinline__ uint4 sum_of(const T* a, const T* b) {
  const uint4 first = *reinterpret_cast<const uint4*>(a), second = *reinterpret_cast<const uint4*>(b);
  uint4 result;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      reinterpret_cast<float*>(&result)[i] =
          reinterpret_cast<const float*>(&first)[i] + reinterpret_cast<const float*>(&second)[i];
    }
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      reinterpret_cast<Pair*>(&result)[i] =
          __hadd2(reinterpret_cast<const Pair*>(&first)[i], reinterpret_cast<const Pair*>(&second)[i]);
    }
  }
  return result;
}

// Writes 16 bytes to shared memory.
template <typename T>
__device__ __forceinline__ void write_chunk(T* shared, uint4 chunk) {
  *reinterpret_cast<uint4*>(shared) = chunk;
}

// The sign of one byte of `low` sixteen times, then that of the same byte of `high`.
__device__ __forceinline__ uint32_t signs_of_bytes(uint32_t low, uint32_t high, int byte) {
  return __byte_perm(low, high, 0xCC88 + 0x1111 * byte);
}

__device__ __forceinline__ void barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// The value of another lane; all 32 take part.
template <typename V>
__device__ __forceinline__ V from_lane(V value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
template <typename V>
__device__ __forceinline__ V from_lane_xor(V value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
__device__ __forceinline__ uint32_t ballot(bool is_set) { return __ballot_sync(~0u, is_set); }

// The block's shared memory, of the size that it was launched with. The swizzle of tiles repeats every 512 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(512) char conddetr_shared[];
  return conddetr_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 bytes to shared memory, or zeros, reading nothing, if not `inside`. Both are 16-byte aligned.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// The same for four bytes.
__device__ __forceinline__ void copy_word_async(void* shared, const void* global, bool inside) {
  const int bytes = inside ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Ends a group of copies; all threads must form the same groups.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies except those of the last `Pending` groups; a barrier makes all threads' copies
// visible.
template <int Pending>
__device__ __forceinline__ void wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8×8 matrices of 16-bit numbers from shared memory; lane 8m + i names row i of matrix m. Of matrix m, lane
// 4g + t receives numbers 2t and 2t+1 of row g, or with `Turned` numbers 2t and 2t+1 of column g.
template <bool Turned>
__device__ __forceinline__ void load_matrices(uint32_t (&result)[4], const void* row) {
  if constexpr (Turned) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// sum += a b for a [16, 16], b [16, 8] and sum [16, 8]. Lane 4g + t holds columns 2t and 2t+1 of row g of `sum`, then
// of row g + 8; of `a` such pairs of rows g and g + 8, then the same from column 8 on; of `b` rows 2t and 2t+1 of
// column g, then rows 2t+8 and 2t+9.
template <typename T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<bf16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<fp16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace conddetr
