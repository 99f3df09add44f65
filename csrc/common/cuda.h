// What the operators on NVIDIA GPUs share: the stream, checks, dtypes.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <type_traits>

#include "common/warp.cuh"

namespace conddetr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Runs a kernel on the current stream of the tensor's device, with so much dynamic shared memory.
template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads, int64_t shared,
            const Tensor& where, std::type_identity_t<Parameters>... arguments) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream));
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess) {
    kernel<<<blocks, threads, size_t(shared), static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

// Bytes of shared memory that a block may have on this device.
inline int64_t shared_limit(const Tensor& where) {
  int limit = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, where.get_device_index());
  STD_TORCH_CHECK(error == cudaSuccess, "conddetr: ", cudaGetErrorString(error));
  return limit;
}

// Blocks for `count` threads of a grid in one dimension.
inline dim3 blocks_for(int64_t count, int64_t per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, "conddetr: too many elements for one launch, ", count);
  return dim3(unsigned(blocks));
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

// What follows in braces adds implementations to the operators of bindings.cpp.
#define CONDDETR_CUDA_OPERATORS(library) STABLE_TORCH_LIBRARY_IMPL(conddetr_native, CUDA, library)

// Runs `function<T>(arguments)` for the element type of `tensor` and returns what it returns.
#define CONDDETR_RETURN_FOR_DTYPE(tensor, function, ...)                                              \
  switch ((tensor).scalar_type()) {                                                                   \
    case torch::headeronly::ScalarType::Float: return function<float>(__VA_ARGS__);                   \
    case torch::headeronly::ScalarType::BFloat16: return function<conddetr::bf16>(__VA_ARGS__);       \
    case torch::headeronly::ScalarType::Half: return function<conddetr::fp16>(__VA_ARGS__);           \
    default: STD_TORCH_CHECK(false, "conddetr: expected float32, bfloat16 or float16 on a GPU");      \
  }
