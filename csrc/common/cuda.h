// Shared code of the operators on NVIDIA GPUs: checks, sizes, dtypes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/launch.cuh"

namespace conddetr {

using torch::headeronly::ScalarType;

// Blocks for `count` threads of a grid in one dimension.
inline dim3 blocks_for(int64_t count, int64_t per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, "conddetr: too many elements for one launch, ", count);
  return dim3(unsigned(blocks));
}

// Kernels move vectors of up to 16 bytes. Views that are not aligned to them are rare, and are copied.
inline bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

inline Tensor aligned(const Tensor& tensor) { return is_aligned(tensor) ? tensor : torch::stable::clone(tensor); }

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace conddetr

// Runs `function<T>(arguments)` for the element type of `tensor` and returns what it returns.
#define CONDDETR_RETURN_FOR_DTYPE(tensor, function, ...)                                         \
  switch ((tensor).scalar_type()) {                                                              \
    case torch::headeronly::ScalarType::Float: return function<float>(__VA_ARGS__);              \
    case torch::headeronly::ScalarType::BFloat16: return function<conddetr::bf16>(__VA_ARGS__);  \
    case torch::headeronly::ScalarType::Half: return function<conddetr::fp16>(__VA_ARGS__);      \
    default: STD_TORCH_CHECK(false, "conddetr: expected float32, bfloat16 or float16 on a GPU"); \
  }
