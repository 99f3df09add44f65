// Attention backward on GPUs: memory and launches.
#pragma once

#include "attn/cuda/backward_lines.cuh"
#include "attn/cuda/table.h"

namespace conddetr::attn {
namespace {

// Gradients of q_content, q_spatial, k_content, k_spatial, columns (empty for dense keys) and v.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T, bool kSeparable>
Gradients backward_form(const Inputs& inputs, const Tensor& grad, const Tensor& out, const Tensor& lse) {
  const int64_t queries = inputs.queries();
  const auto like = [](const Tensor& tensor, int64_t items) {
    return torch::stable::new_empty(tensor, {tensor.size(0), items, tensor.size(2), kWidth});
  };
  Tensor grad_qc = like(inputs.q_content, queries), grad_qs = like(inputs.q_spatial, queries);
  Tensor grad_kc = like(inputs.k_content, inputs.keys()), grad_v = like(inputs.v, inputs.keys());
  Tensor grad_ks = like(inputs.k_spatial, inputs.keys());
  Tensor delta = torch::stable::new_empty(lse, {inputs.batch(), inputs.heads(), queries});

  const Problem<T> p = problem<T>(inputs);
  const Upstream<T> upstream{data<T>(grad), data<T>(out), data<float>(lse), data<float>(delta)};
  const int64_t query_bytes = QueryRows<T, kSeparable>::bytes(inputs.height(), inputs.width());
  launch("conditional_attention_backward (queries)", kernel_backward_query<T, kSeparable>(inputs),
         grid(inputs, tiles_of(queries)), kThreads, checked(query_bytes, inputs), inputs.v, p, upstream,
         data<T>(grad_qc), data<T>(grad_qs));
  launch("conditional_attention_backward (keys)", kernel_backward_key<T, kSeparable>(inputs),
         grid(inputs, tiles_of(inputs.keys())), kThreads, KeyRows<T, kSeparable>::kBytes, inputs.v, p, upstream,
         data<T>(grad_kc), data<T>(grad_ks), data<T>(grad_v));
  if constexpr (!kSeparable) {
    return {grad_qc, grad_qs, grad_kc, grad_ks, torch::stable::new_empty(inputs.v, {0}), grad_v};
  }
  Tensor grad_rows = like(inputs.k_spatial, inputs.height()), grad_columns = like(*inputs.columns, inputs.width());
  constexpr int kLines = kThreads / kLanes;
  launch("conditional_attention_backward (rows and columns)", backward_lines_kernel<T>,
         grid(inputs, (inputs.height() + inputs.width() + kLines - 1) / kLines), kThreads, 0, inputs.v, p,
         data<T>(grad_ks), data<T>(grad_rows), data<T>(grad_columns));
  return {grad_qc, grad_qs, grad_kc, grad_rows, grad_columns, grad_v};
}

template <typename T>
Gradients run_backward(const Inputs& inputs, const Tensor& grad, const Tensor& out, const Tensor& lse) {
  return inputs.columns ? backward_form<T, true>(inputs, grad, out, lse)
                        : backward_form<T, false>(inputs, grad, out, lse);
}

}  // namespace
}  // namespace conddetr::attn
