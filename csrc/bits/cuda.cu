// Random bits on NVIDIA GPUs: operator, checks, launch. The mathematics is in kernels.cuh.

#include "common/cuda.h"

#include "bits/kernels.cuh"

namespace conddetr::bits {
namespace {

Tensor dropout_bits(const Tensor& seed, int64_t count, int64_t threshold) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed: expected one int64");
  STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "threshold: expected 16 bits, got ", threshold);
  const DeviceGuard guard(seed.get_device_index());
  Tensor words = torch::stable::new_empty(seed, {count}, ScalarType::Int);
  if (count == 0) return words;
  launch("dropout_bits", fill_kernel, blocks_for(count, kBlockWords), kThreads, 0, seed, data<uint32_t>(words),
         data<int64_t>(seed), count, Threshold(uint32_t(threshold)));
  return words;
}

CONDDETR_CUDA_OPERATORS(library) { library.impl("dropout_bits", TORCH_BOX(&dropout_bits)); }

}  // namespace
}  // namespace conddetr::bits
