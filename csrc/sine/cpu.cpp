// Sine embedding and λ ⊙ p_s on the CPU: operators, checks, threads. The mathematics is in kernels.cpp.

#include "common/cpu.h"

#include <cmath>
#include <vector>

#include "sine/kernels.h"

namespace conddetr::sine {
namespace {

constexpr int64_t kRowsPerThread = 64;

std::vector<double> rates(int64_t dim, double temperature) {
  std::vector<double> result(dim / 2);
  for (int64_t channel = 0; channel < dim / 2; ++channel) {
    // In float32, like the reference's table.
    result[channel] = 1.0f / std::pow(float(temperature), float(channel / 2 * 2) / float(dim / 2));
  }
  return result;
}

Problem problem(const Tensor& points, const std::optional<Tensor>& transform, const std::vector<double>& rates) {
  const int64_t dim = 2 * int64_t(rates.size()), count = points.numel() / 2;
  STD_TORCH_CHECK(points.is_contiguous() && points.dim() && points.size(points.dim() - 1) == 2,
                  "points: expected contiguous [..., 2]");
  STD_TORCH_CHECK(dim >= 4 && dim % 4 == 0, "dim: expected a positive multiple of 4, got ", dim);
  if (transform) {
    STD_TORCH_CHECK(transform->is_contiguous() && transform->numel() == count * dim,
                    "transform: expected contiguous [..., ", dim, "]");
    STD_TORCH_CHECK(transform->scalar_type() == points.scalar_type(), "transform: expected the dtype of points");
  }
  return {data(points), data_or_null(transform), dim, rates.data(), stored_type(points)};
}

Tensor forward(const Tensor& points, const std::optional<Tensor>& transform, int64_t dim, double temperature) {
  const std::vector<double> table = rates(dim, temperature);
  const Problem p = problem(points, transform, table);
  std::vector<int64_t> shape(points.sizes().begin(), points.sizes().end());
  shape.back() = dim;
  Tensor out = torch::stable::new_empty(points, shape);
  torch::stable::parallel_for(0, points.numel() / 2, kRowsPerThread,
                              [&](int64_t begin, int64_t end) { CONDDETR_CALL(forward, p, data(out), begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& points, const std::optional<Tensor>& transform,
                                    int64_t dim, double temperature) {
  const std::vector<double> table = rates(dim, temperature);
  const Problem p = problem(points, transform, table);
  const Tensor upstream = torch::stable::contiguous(grad);
  STD_TORCH_CHECK(upstream.numel() == points.numel() / 2 * dim && upstream.scalar_type() == points.scalar_type(),
                  "grad: expected [..., ", dim, "] of the dtype of points");
  Tensor grad_points = torch::stable::empty_like(points);
  Tensor grad_transform = transform ? torch::stable::empty_like(*transform) : torch::stable::new_empty(points, {0});
  const Gradients gradients{data(upstream), data(grad_points), transform ? data(grad_transform) : nullptr};
  torch::stable::parallel_for(0, points.numel() / 2, kRowsPerThread,
                              [&](int64_t begin, int64_t end) { CONDDETR_CALL(backward, p, gradients, begin, end); });
  return {grad_points, grad_transform};
}

STABLE_TORCH_LIBRARY_IMPL(conddetr_native, CPU, library) {
  library.impl("sine_embedding", TORCH_BOX(&forward));
  library.impl("sine_embedding_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace conddetr::sine
