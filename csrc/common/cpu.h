// What the operators on the CPU share: dtypes, checks, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/levels.h"
#include "common/stored.h"

namespace conddetr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Stored stored_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Stored::f32;
    case ScalarType::BFloat16: return Stored::bf16;
    case ScalarType::Double: return Stored::f64;
    default: STD_TORCH_CHECK(false, "conddetr: expected float32, bfloat16 or float64 on the CPU");
  }
}

inline void* data(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

}  // namespace conddetr
