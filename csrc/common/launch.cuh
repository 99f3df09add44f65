// Launches and properties of the GPU. As with warp.cuh, tests without a GPU use another header of this name.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <type_traits>

#include "common/warp.cuh"

namespace conddetr {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Runs a kernel on the current stream of the tensor's device, with `shared` bytes of dynamic shared memory.
template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads, int64_t shared,
            const Tensor& where, std::type_identity_t<Parameters>... arguments) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream));
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  }
  if (error == cudaSuccess) {
    kernel<<<blocks, threads, size_t(shared), static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

// Whether this device can run a kernel of hopper/: it is a Hopper GPU, and there is code for sm_90a. Compiled for any
// other architecture, such a kernel is empty; with code, its sums alone need more than 32 registers.
template <typename... Parameters>
bool has_warpgroups(void (*kernel)(Parameters...), const Tensor& where) {
  int major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, where.get_device_index());
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess && major == 9) error = cudaFuncGetAttributes(&attributes, kernel);
  STD_TORCH_CHECK(error == cudaSuccess, "conddetr: ", cudaGetErrorString(error));
  return attributes.numRegs > 32;
}

// Bytes of shared memory that a block may have on this device.
inline int64_t shared_limit(const Tensor& where) {
  int limit = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, where.get_device_index());
  STD_TORCH_CHECK(error == cudaSuccess, "conddetr: ", cudaGetErrorString(error));
  return limit;
}

}  // namespace conddetr

// The block in braces after this adds implementations to the operators of bindings.cpp.
#define CONDDETR_CUDA_OPERATORS(library) STABLE_TORCH_LIBRARY_IMPL(conddetr_native, CUDA, library)
