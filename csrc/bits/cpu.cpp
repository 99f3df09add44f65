// Random bits on the CPU: operator, checks, threads. The mathematics is in kernels.cpp.

#include "common/cpu.h"

#include <algorithm>

#include "bits/kernels.h"

namespace conddetr::bits {
namespace {

constexpr int64_t kChunksPerThread = 16;

Tensor dropout_bits(const Tensor& seed, int64_t count, int64_t threshold) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed: expected one int64");
  STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "threshold: expected 16 bits, got ", threshold);
  Tensor words = torch::stable::new_empty(seed, {count}, ScalarType::Int);
  const uint64_t key = uint64_t(*seed.const_data_ptr<int64_t>());
  torch::stable::parallel_for(0, (count + kChunk - 1) / kChunk, kChunksPerThread, [&](int64_t begin, int64_t end) {
    CONDDETR_CALL(fill, static_cast<uint32_t*>(data(words)), key, uint32_t(threshold), begin * kChunk,
                  std::min(end * kChunk, count));
  });
  return words;
}

STABLE_TORCH_LIBRARY_IMPL(conddetr_native, CPU, library) { library.impl("dropout_bits", TORCH_BOX(&dropout_bits)); }

}  // namespace
}  // namespace conddetr::bits
