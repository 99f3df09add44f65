// Conditional attention on NVIDIA GPUs: operators, checks, memory, launches. The mathematics is in forward.cuh,
// backward_query.cuh, backward_key.cuh and backward_lines.cuh, and in hopper.cuh for the forward pass there.

#include "common/cuda.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "attn/cuda/backward_key.cuh"
#include "attn/cuda/backward_lines.cuh"
#include "attn/cuda/backward_query.cuh"
#include "attn/cuda/forward.cuh"
#include "attn/cuda/hopper/backward_key.cuh"
#include "attn/cuda/hopper/backward_query.cuh"
#include "attn/cuda/hopper/forward.cuh"

namespace conddetr::attn {
namespace {

// The largest grid of the presets, 1333 × 1333 pixels at stride 16, fits GPUs with the smallest shared memory.
static_assert(QueryRows<bf16, true>::bytes(84, 84) <= 99 * 1024);

// The arguments that both operators have; see kernels/attn/op.py.
struct Inputs {
  Tensor q_content, q_spatial, k_content, k_spatial;
  std::optional<Tensor> columns;
  Tensor v;
  std::optional<Tensor> valid_hw, key_padding_mask, keep;
  double scale, dropout_p;

  int64_t batch() const { return q_content.size(0); }
  int64_t queries() const { return q_content.size(1); }
  int64_t heads() const { return q_content.size(2); }
  int64_t keys() const { return k_content.size(1); }
  int64_t height() const { return columns ? k_spatial.size(1) : 1; }
  int64_t width() const { return columns ? columns->size(1) : keys(); }
  int64_t tiles() const { return (keys() + kTile - 1) / kTile; }

  // Throws if a kernel would read what is not there; copies what does not lie in steps of 16 bytes.
  void prepare() {
    STD_TORCH_CHECK(q_content.dim() == 4 && k_content.dim() == 4 && k_spatial.dim() == 4,
                    "q_content, k_content, k_spatial: expected four dimensions");
    STD_TORCH_CHECK(!columns || columns->dim() == 4, "columns: expected four dimensions");
    prepare(q_content, "q_content", queries());
    prepare(q_spatial, "q_spatial", queries());
    prepare(k_content, "k_content", keys());
    prepare(k_spatial, "k_spatial", columns ? height() : keys());
    if (columns) prepare(*columns, "columns", width());
    prepare(v, "v", keys());
    STD_TORCH_CHECK(height() * width() == keys() && keys() < int64_t(1) << 30 && queries() < int64_t(1) << 30,
                    "expected H · W keys, and fewer than 2^30 keys and queries");
    STD_TORCH_CHECK(batch() < 65536 && heads() < 65536, "expected fewer than 65536 images and heads");
    check(valid_hw, "valid_hw", ScalarType::Int, 2 * batch());
    check(key_padding_mask, "key_padding_mask", ScalarType::Bool, batch() * keys());
    check(keep, "keep", ScalarType::Int, batch() * heads() * 2 * tiles() * queries());
    STD_TORCH_CHECK(dropout_p == 0 || keep, "keep: expected bits with dropout");
  }

  void prepare(Tensor& tensor, const char* name, int64_t items) const {
    STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == batch() && tensor.size(1) == items &&
                        tensor.size(2) == heads() && tensor.size(3) == kWidth,
                    name, ": expected shape [", batch(), ", ", items, ", ", heads(), ", ", kWidth, "]");
    STD_TORCH_CHECK(tensor.scalar_type() == q_content.scalar_type() &&
                        tensor.get_device_index() == q_content.get_device_index(),
                    name, ": expected the dtype and device of q_content");
    const int64_t step = 16 / tensor.element_size();
    const bool is_in_steps =
        tensor.stride(0) % step == 0 && tensor.stride(1) % step == 0 && tensor.stride(2) % step == 0;
    const bool is_near = tensor.stride(1) * int64_t(tensor.element_size()) < int64_t(1) << 31;  // kernels have ints
    if (tensor.stride(3) != 1 || !is_in_steps || !is_near) tensor = torch::stable::contiguous(tensor);
    tensor = aligned(tensor);
  }

  void check(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype, int64_t numbers) const {
    STD_TORCH_CHECK(!tensor || (tensor->scalar_type() == dtype && tensor->is_contiguous() &&
                                tensor->numel() == numbers && tensor->get_device_index() == q_content.get_device_index()),
                    name, ": expected ", numbers, " contiguous numbers of the schema's dtype, on the device of q_content");
  }
};

template <typename T>
Rows<T> rows(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <typename T>
Problem<T> problem(const Inputs& inputs) {
  Problem<T> p{};
  p.q_content = rows<T>(inputs.q_content);
  p.q_spatial = rows<T>(inputs.q_spatial);
  p.k_content = rows<T>(inputs.k_content);
  p.spatial = rows<T>(inputs.k_spatial);
  if (inputs.columns) p.columns = rows<T>(*inputs.columns);
  p.v = rows<T>(inputs.v);
  p.queries = int(inputs.queries());
  p.keys = int(inputs.keys());
  p.heads = int(inputs.heads());
  p.height = int(inputs.height());
  p.width = int(inputs.width());
  p.valid_hw = data_or_null<int32_t>(inputs.valid_hw);
  p.padding = data_or_null<bool>(inputs.key_padding_mask);
  if (inputs.dropout_p > 0) p.keep = data_or_null<uint32_t>(inputs.keep);
  p.keep_words = int(2 * inputs.tiles());
  p.scale = float(inputs.scale);
  p.log2_scale = inputs.scale == 0 ? std::numeric_limits<float>::min() : float(inputs.scale * 1.4426950408889634);
  p.hidden = -std::copysign(std::numeric_limits<float>::infinity(), p.log2_scale);
  p.drop_factor = float(1.0 - inputs.dropout_p);
  return p;
}

int64_t checked(int64_t bytes, const Inputs& inputs) {
  const int64_t limit = shared_limit(inputs.v);
  STD_TORCH_CHECK(bytes <= limit, "k_spatial: a grid of ", inputs.height(), " × ", inputs.width(), " needs ", bytes,
                  " bytes of shared memory, this GPU has ", limit, "; use backend=\"triton\"");
  return bytes;
}

dim3 grid(const Inputs& inputs, int64_t tiles) {
  return dim3(unsigned(tiles), unsigned(inputs.heads()), unsigned(inputs.batch()));
}

int64_t tiles_of(int64_t items) { return (items + kTile - 1) / kTile; }

// Whether the environment allows the kernels for Hopper: yes, unless CONDDETR_HOPPER is 0 (to compare).
bool wants_hopper() {
  const char* value = std::getenv("CONDDETR_HOPPER");
  return value == nullptr || std::strcmp(value, "0") != 0;
}

// A kernel's form for Hopper where it can run, else the one for any GPU. Both have the same blocks.
template <typename... Parameters>
auto fitting(void (*any)(Parameters...), void (*hopper)(Parameters...), const Inputs& inputs) {
  return wants_hopper() && has_warpgroups(hopper, inputs.v) ? hopper : any;
}

template <typename T, bool kSeparable>
auto kernel_forward(const Inputs& inputs) {
  const auto any = forward_kernel<T, kSeparable>;
  if constexpr (sizeof(T) == 2) {
    const auto dropping = hopper_forward_kernel<T, kSeparable, true>;
    return fitting(any, inputs.dropout_p > 0 ? dropping : hopper_forward_kernel<T, kSeparable, false>, inputs);
  }
  return any;
}

template <typename T, bool kSeparable>
std::tuple<Tensor, Tensor> forward_form(const Inputs& inputs) {
  Tensor out = torch::stable::new_empty(inputs.v, {inputs.batch(), inputs.queries(), inputs.heads(), kWidth});
  Tensor lse = torch::stable::new_empty(inputs.v, {inputs.batch(), inputs.heads(), inputs.queries()}, ScalarType::Float);
  const int64_t bytes = forward_bytes<T, kSeparable>(inputs.height(), inputs.width());
  launch("conditional_attention", kernel_forward<T, kSeparable>(inputs), grid(inputs, tiles_of(inputs.queries())),
         kThreads, checked(bytes, inputs), inputs.v, problem<T>(inputs), data<T>(out), data<float>(lse));
  return {out, lse};
}

template <typename T, bool kSeparable>
auto kernel_backward_query(const Inputs& inputs) {
  const auto any = backward_query_kernel<T, kSeparable>;
  if constexpr (sizeof(T) == 2) return fitting(any, hopper_backward_query_kernel<T, kSeparable>, inputs);
  return any;
}

template <typename T, bool kSeparable>
auto kernel_backward_key(const Inputs& inputs) {
  const auto any = backward_key_kernel<T, kSeparable>;
  if constexpr (sizeof(T) == 2) return fitting(any, hopper_backward_key_kernel<T, kSeparable>, inputs);
  return any;
}

// Of q_content, q_spatial, k_content, k_spatial, columns (empty for dense keys) and v.
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
         grid(inputs, inputs.tiles()), kThreads, KeyRows<T, kSeparable>::kBytes, inputs.v, p, upstream,
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
std::tuple<Tensor, Tensor> run_forward(const Inputs& inputs) {
  return inputs.columns ? forward_form<T, true>(inputs) : forward_form<T, false>(inputs);
}

template <typename T>
Gradients run_backward(const Inputs& inputs, const Tensor& grad, const Tensor& out, const Tensor& lse) {
  return inputs.columns ? backward_form<T, true>(inputs, grad, out, lse)
                        : backward_form<T, false>(inputs, grad, out, lse);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q_content, const Tensor& q_spatial, const Tensor& k_content,
                                   const Tensor& k_spatial, const std::optional<Tensor>& columns, const Tensor& v,
                                   const std::optional<Tensor>& valid_hw, const std::optional<Tensor>& key_padding_mask,
                                   const std::optional<Tensor>& keep, double scale, double dropout_p) {
  Inputs inputs{q_content, q_spatial, k_content, k_spatial, columns, v, valid_hw, key_padding_mask, keep, scale, dropout_p};
  const DeviceGuard guard(v.get_device_index());
  inputs.prepare();
  CONDDETR_RETURN_FOR_DTYPE(v, run_forward, inputs)
}

Gradients backward(const Tensor& q_content, const Tensor& q_spatial, const Tensor& k_content, const Tensor& k_spatial,
                   const std::optional<Tensor>& columns, const Tensor& v, const std::optional<Tensor>& valid_hw,
                   const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& keep, double scale,
                   double dropout_p, const Tensor& grad, const Tensor& out, const Tensor& lse) {
  Inputs inputs{q_content, q_spatial, k_content, k_spatial, columns, v, valid_hw, key_padding_mask, keep, scale, dropout_p};
  const DeviceGuard guard(v.get_device_index());
  inputs.prepare();
  Tensor upstream = torch::stable::contiguous(grad), result = torch::stable::contiguous(out);
  inputs.prepare(upstream, "grad", inputs.queries());
  inputs.prepare(result, "out", inputs.queries());
  inputs.check(lse, "lse", ScalarType::Float, inputs.batch() * inputs.heads() * inputs.queries());
  CONDDETR_RETURN_FOR_DTYPE(v, run_backward, inputs, upstream, result, lse)
}

CONDDETR_CUDA_OPERATORS(library) {
  library.impl("conditional_attention", TORCH_BOX(&forward));
  library.impl("conditional_attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace conddetr::attn
