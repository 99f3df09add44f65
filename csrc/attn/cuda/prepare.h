// From the inputs to the GPU kernels' arguments: checks, copies, sizes.
#pragma once

#include "common/cuda.h"

#include <cmath>
#include <limits>

#include "attn/cuda/problem.cuh"
#include "attn/inputs.h"

namespace conddetr::attn {
namespace {

// Checks a tensor, and copies it if it is not aligned to 16 bytes or its strides are too large.
void prepare(Tensor& tensor, const char* name, int64_t items, const Inputs& inputs) {
  const int64_t batch = inputs.batch(), heads = inputs.heads();
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == items && tensor.size(2) == heads &&
                      tensor.size(3) == kWidth,
                  name, ": expected shape [", batch, ", ", items, ", ", heads, ", ", kWidth, "]");
  STD_TORCH_CHECK(tensor.scalar_type() == inputs.q_content.scalar_type() &&
                      tensor.get_device_index() == inputs.q_content.get_device_index(),
                  name, ": expected the dtype and device of q_content");
  const int64_t step = 16 / tensor.element_size();
  const bool is_in_steps = tensor.stride(0) % step == 0 && tensor.stride(1) % step == 0 && tensor.stride(2) % step == 0;
  const bool is_near = tensor.stride(1) * int64_t(tensor.element_size()) < int64_t(1) << 31;  // kernels use int
  if (tensor.stride(3) != 1 || !is_in_steps || !is_near) tensor = torch::stable::contiguous(tensor);
  tensor = aligned(tensor);
}

void check(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype, int64_t numbers,
           const Inputs& inputs) {
  STD_TORCH_CHECK(!tensor || (tensor->scalar_type() == dtype && tensor->is_contiguous() && tensor->numel() == numbers &&
                              tensor->get_device_index() == inputs.q_content.get_device_index()),
                  name, ": expected ", numbers,
                  " contiguous numbers of the schema's dtype, on the device of q_content");
}

// Throws if a kernel would read out of bounds; copies tensors that are not aligned to 16 bytes.
void prepare(Inputs& inputs) {
  STD_TORCH_CHECK(inputs.q_content.dim() == 4 && inputs.k_content.dim() == 4 && inputs.k_spatial.dim() == 4,
                  "q_content, k_content, k_spatial: expected four dimensions");
  STD_TORCH_CHECK(!inputs.columns || inputs.columns->dim() == 4, "columns: expected four dimensions");
  const int64_t batch = inputs.batch(), heads = inputs.heads(), queries = inputs.queries(), keys = inputs.keys();
  prepare(inputs.q_content, "q_content", queries, inputs);
  prepare(inputs.q_spatial, "q_spatial", queries, inputs);
  prepare(inputs.k_content, "k_content", keys, inputs);
  prepare(inputs.k_spatial, "k_spatial", inputs.columns ? inputs.height() : keys, inputs);
  if (inputs.columns) prepare(*inputs.columns, "columns", inputs.width(), inputs);
  prepare(inputs.v, "v", keys, inputs);
  STD_TORCH_CHECK(inputs.height() * inputs.width() == keys && keys < int64_t(1) << 30 && queries < int64_t(1) << 30,
                  "expected H · W keys, and fewer than 2^30 keys and queries");
  STD_TORCH_CHECK(batch < 65536 && heads < 65536, "expected fewer than 65536 images and heads");
  check(inputs.valid_cells, "valid_cells", ScalarType::Int, 2 * batch, inputs);
  check(inputs.key_padding_mask, "key_padding_mask", ScalarType::Bool, batch * keys, inputs);
  check(inputs.keep, "keep", ScalarType::Int, batch * heads * inputs.keep_words() * queries, inputs);
  STD_TORCH_CHECK(inputs.dropout_p == 0 || inputs.keep, "keep: expected bits with dropout");
}

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
  p.valid_cells = data_or_null<int32_t>(inputs.valid_cells);
  p.padding = data_or_null<bool>(inputs.key_padding_mask);
  if (inputs.dropout_p > 0) p.keep = data_or_null<uint32_t>(inputs.keep);
  p.keep_words = int(inputs.keep_words());
  p.scale = float(inputs.scale);
  p.log2_scale = inputs.scale == 0 ? std::numeric_limits<float>::min() : float(inputs.scale * 1.4426950408889634);
  p.hidden = -std::copysign(std::numeric_limits<float>::infinity(), p.log2_scale);
  p.drop_factor = float(1.0 - inputs.dropout_p);
  return p;
}

}  // namespace
}  // namespace conddetr::attn
