// Stands in for csrc/common/cuda.h: launches run on the CPU, block after block, and operators join another namespace.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <type_traits>

#include "common/warp.cuh"

namespace conddetr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <typename... Parameters>
void launch(const char*, void (*kernel)(Parameters...), dim3 blocks, int threads, int64_t shared, const Tensor&,
            std::type_identity_t<Parameters>... arguments) {
  for (blockIdx.z = 0; blockIdx.z < blocks.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) {
        emulator::run_block(threads, size_t(shared), [&] { kernel(arguments...); });
      }
    }
  }
}

inline int64_t shared_limit(const Tensor&) { return 99 * 1024; }

inline dim3 blocks_for(int64_t count, int64_t per_block) { return dim3(unsigned((count + per_block - 1) / per_block)); }

inline Tensor aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace conddetr

#define CONDDETR_CUDA_OPERATORS(library) STABLE_TORCH_LIBRARY_IMPL(conddetr_emulated, CPU, library)

#define CONDDETR_RETURN_FOR_DTYPE(tensor, function, ...)                                           \
  switch ((tensor).scalar_type()) {                                                                \
    case torch::headeronly::ScalarType::Float: return function<float>(__VA_ARGS__);                \
    case torch::headeronly::ScalarType::BFloat16: return function<conddetr::bf16>(__VA_ARGS__);    \
    default: STD_TORCH_CHECK(false, "the emulator knows float32 and bfloat16");                    \
  }
