// From the inputs to the CPU kernels' problem: checks, and the visited keys. Part of cpu.cpp.
#pragma once

#include "common/cpu.h"

#include <vector>

#include "attn/cpu/visited.h"
#include "attn/inputs.h"

namespace conddetr::attn {
namespace {

Tensor4 strided(const Tensor& tensor, const char* name, int64_t batch, int64_t items, int64_t heads, int64_t channels,
                ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == items && tensor.size(2) == heads &&
                      tensor.size(3) == channels,
                  name, ": expected shape [", batch, ", ", items, ", ", heads, ", ", channels, "]");
  STD_TORCH_CHECK(tensor.stride(3) == 1 || channels == 1, name, ": expected the last dimension to be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected the dtype of q_content");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A call's problem, and the memory that its pointers point to.
struct Call {
  explicit Call(const Inputs& inputs) {
    STD_TORCH_CHECK(inputs.q_content.dim() == 4 && inputs.q_spatial.dim() == 4 && inputs.k_content.dim() == 4 &&
                        inputs.v.dim() == 4,
                    "expected four dimensions of every tensor");
    p.batch = inputs.batch(), p.queries = inputs.queries(), p.heads = inputs.heads(), p.keys = inputs.keys();
    p.height = inputs.height(), p.width = inputs.width();
    p.d = inputs.q_content.size(3), p.ds = inputs.q_spatial.size(3), p.dv = inputs.v.size(3);
    p.scale = inputs.scale, p.dropout_p = inputs.dropout_p;
    STD_TORCH_CHECK(p.height * p.width == p.keys && p.keys < int64_t(1) << 31, "expected H · W keys, fewer than 2^31");
    p.stored = stored_type(inputs.q_content);
    find_tensors(inputs);
    find_kept(inputs);
    find_keys(inputs.valid_cells, inputs.key_padding_mask);
  }

  void find_tensors(const Inputs& inputs) {
    const auto find = [&](const Tensor& tensor, const char* name, int64_t items, int64_t channels) {
      return strided(tensor, name, p.batch, items, p.heads, channels, inputs.q_content.scalar_type());
    };
    p.q_content = find(inputs.q_content, "q_content", p.queries, p.d);
    p.q_spatial = find(inputs.q_spatial, "q_spatial", p.queries, p.ds);
    p.k_content = find(inputs.k_content, "k_content", p.keys, p.d);
    p.spatial = find(inputs.k_spatial, "k_spatial", inputs.columns ? p.height : p.keys, p.ds);
    if (inputs.columns) p.columns = find(*inputs.columns, "columns", p.width, p.ds);
    p.v = find(inputs.v, "v", p.keys, p.dv);
  }

  void find_kept(const Inputs& inputs) {
    p.keep_words = inputs.keep_words();
    const std::optional<Tensor>& keep = inputs.keep;
    STD_TORCH_CHECK(p.dropout_p == 0 || (keep && keep->scalar_type() == ScalarType::Int && keep->is_contiguous() &&
                                         keep->numel() == p.batch * p.heads * p.keep_words * p.queries),
                    "keep: expected contiguous int32 [B, heads, 2 · ceil(N / 64), Q] with dropout");
    p.keep = p.dropout_p > 0 ? static_cast<const uint32_t*>(keep->const_data_ptr()) : nullptr;
  }

  void find_keys(const std::optional<Tensor>& valid_cells, const std::optional<Tensor>& mask) {
    STD_TORCH_CHECK(!valid_cells || (valid_cells->scalar_type() == ScalarType::Int && valid_cells->is_contiguous() &&
                                     valid_cells->numel() == 2 * p.batch),
                    "valid_cells: expected contiguous int32 [B, 2]");
    STD_TORCH_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                              mask->numel() == p.batch * p.keys),
                    "key_padding_mask: expected contiguous bool [B, N]");
    const auto* rectangle = static_cast<const int32_t*>(data_or_null(valid_cells));
    const auto* padding = static_cast<const bool*>(data_or_null(mask));
    const bool is_same = !rectangle && !padding;
    for (int64_t image = 0; image < (is_same ? 1 : p.batch); ++image) {
      visited.push_back(visit(rectangle, padding, image, int32_t(p.height), int32_t(p.width)));
    }
    for (int64_t image = 0; image < p.batch; ++image) {
      const Visited& in_image = visited[is_same ? 0 : image];
      keys.push_back({in_image.runs.data(), in_image.tiles.data(), int64_t(in_image.tiles.size())});
    }
    p.visited = keys.data();
  }

  Problem p{};
  std::vector<Visited> visited;
  std::vector<Keys> keys;
};

}  // namespace
}  // namespace conddetr::attn
