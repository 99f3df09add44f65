// Conditional attention on NVIDIA GPUs: the operators. Kernels and launches are in cuda/.

#include "attn/cuda/launch_backward.h"
#include "attn/cuda/launch_forward.h"

namespace conddetr::attn {
namespace {

std::tuple<Tensor, Tensor> forward(Inputs inputs) {
  const DeviceGuard guard(inputs.v.get_device_index());
  prepare(inputs);
  CONDDETR_RETURN_FOR_DTYPE(inputs.v, run_forward, inputs)
}

Gradients backward(Inputs inputs, const Tensor& grad, const Tensor& out, const Tensor& lse) {
  const DeviceGuard guard(inputs.v.get_device_index());
  prepare(inputs);
  Tensor upstream = torch::stable::contiguous(grad), result = torch::stable::contiguous(out);
  prepare(upstream, "grad", inputs.queries(), inputs);
  prepare(result, "out", inputs.queries(), inputs);
  check(lse, "lse", ScalarType::Float, inputs.batch() * inputs.heads() * inputs.queries(), inputs);
  CONDDETR_RETURN_FOR_DTYPE(inputs.v, run_backward, inputs, upstream, result, lse)
}

CONDDETR_CUDA_OPERATORS(library) {
  library.impl("conditional_attention", TORCH_BOX(&Unpacked<forward>::call));
  library.impl("conditional_attention_backward", TORCH_BOX(&Unpacked<backward>::call));
}

}  // namespace
}  // namespace conddetr::attn
