// What the operators on NVIDIA GPUs share: the stream, checks, dtypes.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/warp.cuh"

namespace conddetr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

// Kernels move vectors of up to 16 bytes. A view that starts elsewhere is copied; rare.
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
#define CONDDETR_RETURN_FOR_DTYPE(tensor, function, ...)                                              \
  switch ((tensor).scalar_type()) {                                                                   \
    case torch::headeronly::ScalarType::Float: return function<float>(__VA_ARGS__);                   \
    case torch::headeronly::ScalarType::BFloat16: return function<conddetr::bf16>(__VA_ARGS__);       \
    case torch::headeronly::ScalarType::Half: return function<conddetr::fp16>(__VA_ARGS__);           \
    default: STD_TORCH_CHECK(false, "conddetr: expected float32, bfloat16 or float16 on a GPU");      \
  }
