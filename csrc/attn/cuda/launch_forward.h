// Attention forward on GPUs: memory and launch.
#pragma once

#include "attn/cuda/table.h"

namespace conddetr::attn {
namespace {

template <typename T, bool kSeparable>
std::tuple<Tensor, Tensor> forward_form(const Inputs& inputs) {
  Tensor out = torch::stable::new_empty(inputs.v, {inputs.batch(), inputs.queries(), inputs.heads(), kWidth});
  Tensor lse =
      torch::stable::new_empty(inputs.v, {inputs.batch(), inputs.heads(), inputs.queries()}, ScalarType::Float);
  const int64_t bytes = forward_bytes<T, kSeparable>(inputs.height(), inputs.width());
  launch("conditional_attention", kernel_forward<T, kSeparable>(inputs), grid(inputs, tiles_of(inputs.queries())),
         kThreads, checked(bytes, inputs), inputs.v, problem<T>(inputs), data<T>(out), data<float>(lse));
  return {out, lse};
}

template <typename T>
std::tuple<Tensor, Tensor> run_forward(const Inputs& inputs) {
  return inputs.columns ? forward_form<T, true>(inputs) : forward_form<T, false>(inputs);
}

}  // namespace
}  // namespace conddetr::attn
