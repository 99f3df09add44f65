// Sine embedding and λ ⊙ p_s on NVIDIA GPUs: operators, checks, launches. The mathematics is in kernels.cuh.

#include "common/cuda.h"

#include <cmath>
#include <vector>

#include "sine/kernels.cuh"

namespace conddetr::sine {
namespace {

void check(const Tensor& points, const std::optional<Tensor>& transform, int64_t dim) {
  STD_TORCH_CHECK(points.is_contiguous() && points.dim() && points.size(points.dim() - 1) == 2,
                  "points: expected contiguous [..., 2]");
  STD_TORCH_CHECK(dim >= 4 && dim % 4 == 0 && dim < 1 << 30, "dim: expected a positive multiple of 4, got ", dim);
  if (!transform) return;
  STD_TORCH_CHECK(transform->is_contiguous() && transform->numel() == points.numel() / 2 * dim,
                  "transform: expected contiguous [..., ", dim, "]");
  STD_TORCH_CHECK(
      transform->scalar_type() == points.scalar_type() && transform->get_device_index() == points.get_device_index(),
      "transform: expected the dtype and device of points");
}

template <typename T>
Tensor run_forward(const Tensor& points, const std::optional<Tensor>& transform, int64_t dim, float log2_temperature) {
  std::vector<int64_t> shape(points.sizes().begin(), points.sizes().end());
  shape.back() = dim;
  Tensor out = torch::stable::new_empty(points, shape);
  const int64_t count = points.numel() / 2;
  if (count == 0) return out;
  launch("sine_embedding", forward_kernel<T>, blocks_for(count * (dim / kVector), kThreads), kThreads, 0, points,
         data<T>(points), data_or_null<T>(transform), data<T>(out), count, int(dim), log2_temperature);
  return out;
}

template <typename T>
std::tuple<Tensor, Tensor> run_backward(const Tensor& grad, const Tensor& points,
                                        const std::optional<Tensor>& transform, int64_t dim, float log2_temperature) {
  Tensor grad_points = torch::stable::empty_like(points);
  Tensor grad_transform = transform ? torch::stable::empty_like(*transform) : torch::stable::new_empty(points, {0});
  const int64_t count = points.numel() / 2;
  if (count == 0) return {grad_points, grad_transform};
  launch("sine_embedding_backward", backward_kernel<T>, blocks_for(count, kThreads / kLanes), kThreads, 0, points,
         data<T>(grad), data<T>(points), data_or_null<T>(transform), data<T>(grad_points),
         transform ? data<T>(grad_transform) : nullptr, count, int(dim), log2_temperature);
  return {grad_points, grad_transform};
}

std::optional<Tensor> aligned_or_none(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(aligned(*tensor)) : std::nullopt;
}

Tensor forward(const Tensor& points, const std::optional<Tensor>& transform, int64_t dim, double temperature) {
  check(points, transform, dim);
  const DeviceGuard guard(points.get_device_index());
  const float log2_temperature = float(std::log2(temperature));
  CONDDETR_RETURN_FOR_DTYPE(points, run_forward, points, aligned_or_none(transform), dim, log2_temperature)
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& points, const std::optional<Tensor>& transform,
                                    int64_t dim, double temperature) {
  check(points, transform, dim);
  STD_TORCH_CHECK(grad.numel() == points.numel() / 2 * dim && grad.scalar_type() == points.scalar_type(),
                  "grad: expected [..., ", dim, "] of the dtype of points");
  const DeviceGuard guard(points.get_device_index());
  const Tensor upstream = aligned(torch::stable::contiguous(grad));
  const float log2_temperature = float(std::log2(temperature));
  CONDDETR_RETURN_FOR_DTYPE(points, run_backward, upstream, points, aligned_or_none(transform), dim, log2_temperature)
}

CONDDETR_CUDA_OPERATORS(library) {
  library.impl("sine_embedding", TORCH_BOX(&forward));
  library.impl("sine_embedding_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace conddetr::sine
