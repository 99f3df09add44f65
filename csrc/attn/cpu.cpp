// Conditional attention on the CPU: operators, memory, threads. The mathematics is in kernels.cpp.

#include "common/cpu.h"

#include <algorithm>
#include <vector>

#include "attn/cpu/call.h"

namespace conddetr::attn {
namespace {

// Backward splits heads until there are this many tasks: enough for the cores of one socket.
constexpr int64_t kTasks = 16;

std::tuple<Tensor, Tensor> forward(Inputs inputs) {
  const Call call(inputs);
  const Problem& p = call.p;
  Tensor out = torch::stable::new_empty(inputs.v, {p.batch, p.queries, p.heads, p.dv});
  const ScalarType lse_type = p.stored == Stored::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor lse = torch::stable::new_empty(inputs.v, {p.batch, p.heads, p.queries}, lse_type);
  const Result result{data(out), data(lse)};
  // A head of an image is a task; if there are too few, its queries are split, because they are independent.
  const int64_t groups = p.batch * p.heads, threads = torch::stable::get_num_threads();
  const int64_t parts = std::max<int64_t>(1, std::min((2 * threads + groups - 1) / groups, p.queries / kBlockQueries));
  const int64_t step = (p.queries + parts * kBlockQueries - 1) / (parts * kBlockQueries) * kBlockQueries;
  for_each_task(groups * parts, [&](int64_t task) {
    const int64_t group = task / parts, first = task % parts * step;
    const Task part{group / p.heads, group % p.heads, first, std::min(first + step, p.queries)};
    if (part.begin < part.end) CONDDETR_CALL(forward, p, result, part);
  });
  return {out, lse};
}

// Contiguous zeros.
Tensor zeros_like(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return torch::stable::new_zeros(tensor, std::vector<int64_t>(sizes.begin(), sizes.end()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(Inputs inputs, const Tensor& grad,
                                                                    const Tensor& out, const Tensor& lse) {
  const Call call(inputs);
  const Problem& p = call.p;
  const Tensor upstream = torch::stable::contiguous(grad);
  const ScalarType lse_type = p.stored == Stored::f64 ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* tensor : {&upstream, &out}) {
    strided(*tensor, "grad or out", p.batch, p.queries, p.heads, p.dv, inputs.q_content.scalar_type());
  }
  STD_TORCH_CHECK(out.is_contiguous() && lse.is_contiguous() && lse.scalar_type() == lse_type &&
                      lse.numel() == p.batch * p.heads * p.queries,
                  "out and lse: expected the results of forward");
  // Padding is never visited, so its gradient is zero from the start.
  const Tensor grads[] = {zeros_like(inputs.q_content),
                          zeros_like(inputs.q_spatial),
                          zeros_like(inputs.k_content),
                          zeros_like(inputs.k_spatial),
                          inputs.columns ? zeros_like(*inputs.columns) : torch::stable::new_empty(inputs.v, {0}),
                          zeros_like(inputs.v)};
  const Upstream given{data(upstream), data(out), data(lse)};
  const Gradients gradients{
      data(grads[0]), data(grads[1]), data(grads[2]), data(grads[3]), inputs.columns ? data(grads[4]) : nullptr,
      data(grads[5])};
  // A head of an image is a task; if there are few, its tiles are split. The split does not depend on the number of
  // threads, so the order of every sum depends only on the shapes.
  const int64_t groups = p.batch * p.heads, parts = std::max<int64_t>(1, kTasks / groups);
  size_t bytes = 0;
  CONDDETR_CALL(partial_bytes, p, bytes);
  const Tensor partials = torch::stable::new_empty(inputs.v, {groups * parts * int64_t(bytes)}, ScalarType::Byte);
  char* memory = static_cast<char*>(data(partials));
  for_each_task(groups * parts, [&](int64_t task) {
    const int64_t group = task / parts, part = task % parts, tiles = p.visited[group / p.heads].count;
    const Task some{group / p.heads, group % p.heads, tiles * part / parts, tiles * (part + 1) / parts};
    CONDDETR_CALL(backward, p, given, gradients, some, memory + task * bytes);
  });
  for_each_task(groups, [&](int64_t group) {
    CONDDETR_CALL(finish, p, gradients, group / p.heads, group % p.heads, memory + group * parts * bytes, parts);
  });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

STABLE_TORCH_LIBRARY_IMPL(conddetr_native, CPU, library) {
  library.impl("conditional_attention", TORCH_BOX(&Unpacked<forward>::call));
  library.impl("conditional_attention_backward", TORCH_BOX(&Unpacked<backward>::call));
}

}  // namespace
}  // namespace conddetr::attn
