// Replaces csrc/common/launch.cuh: launches run on the CPU, block after block, and operators join another namespace.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <type_traits>

#include "common/warp.cuh"

namespace conddetr {

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

template <typename... Parameters>
bool has_warpgroups(void (*)(Parameters...), const Tensor&) {
  return true;
}

inline int64_t shared_limit(const Tensor&) { return 99 * 1024; }

}  // namespace conddetr

#define CONDDETR_CUDA_OPERATORS(library) STABLE_TORCH_LIBRARY_IMPL(conddetr_emulated, CPU, library)
