// Dropout on the CPU: operator, checks, threads. The mathematics is in kernels.cpp.

#include "common/cpu.h"

#include <algorithm>

#include "cpu/dropout/kernels.h"

namespace conddetr::dropout {
namespace {

constexpr int64_t kChunksPerThread = 32;

void check_like(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == x.numel() && tensor.scalar_type() == x.scalar_type(),
                  name, ": expected contiguous, of the shape and dtype of x");
}

Tensor dropout(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& seed, double p, bool relu) {
  check_like(x, x, "x");
  if (residual) check_like(*residual, x, "residual");
  STD_TORCH_CHECK(!(residual && relu), "relu: expected no residual with ReLU");
  STD_TORCH_CHECK(p >= 0 && p < 1, "p: expected a probability in [0, 1), got ", p);
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed: expected one int64");
  Tensor out = torch::stable::empty_like(x);
  const uint64_t key = uint64_t(*seed.const_data_ptr<int64_t>());
  const Problem problem{data(x), data_or_null(residual), data(out), x.numel(), key, p, relu, stored_type(x)};
  const int64_t chunks = (problem.count + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, kChunksPerThread, [&](int64_t begin, int64_t end) {
    CONDDETR_CALL(apply, problem, begin * kChunk, std::min(end * kChunk, problem.count));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(conddetr_native, CPU, library) { library.impl("dropout", TORCH_BOX(&dropout)); }

}  // namespace
}  // namespace conddetr::dropout
