// Shared code of the operators on the CPU: dtypes, checks, threads.
#pragma once

#include <algorithm>
#include <atomic>

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

// Calls task(0) … task(count - 1) from torch's threads. A free thread takes the next task, because images of different
// valid sizes make tasks of different lengths.
template <typename Function>
void for_each_task(int64_t count, const Function& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

}  // namespace conddetr
