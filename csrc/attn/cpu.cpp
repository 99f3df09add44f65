// Conditional attention on the CPU: operators, checks, which keys are visited, threads. The mathematics is in
// kernels.cpp.

#include "common/cpu.h"

#include <algorithm>
#include <vector>

#include "attn/kernels.h"
#include "common/rectangle.h"

namespace conddetr::attn {

namespace {

// Backward splits heads until there are so many tasks: enough for the cores of one socket.
constexpr int64_t kTasks = 16;

Tensor4 strided(const Tensor& tensor, const char* name, int64_t batch, int64_t items, int64_t heads, int64_t channels,
                ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == items && tensor.size(2) == heads &&
                      tensor.size(3) == channels,
                  name, ": expected shape [", batch, ", ", items, ", ", heads, ", ", channels, "]");
  STD_TORCH_CHECK(tensor.stride(3) == 1 || channels == 1, name, ": expected the last dimension to be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected the dtype of q_content");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The keys of one image that are visited, cut into tiles.
struct Visited {
  std::vector<Run> runs;
  std::vector<Tile> tiles;

  void add(int32_t row, int32_t column, int32_t length, int64_t ordinal) {
    while (length > 0) {
      if (tiles.empty() || tiles.back().keys == kTileKeys) tiles.push_back({int32_t(runs.size()), 0, 0});
      Tile& tile = tiles.back();
      const int32_t fits = std::min(length, kTileKeys - tile.keys);
      runs.push_back({tile.keys, fits, row, column, ordinal});
      tile.keys += fits;
      ++tile.runs;
      column += fits;
      ordinal += fits;
      length -= fits;
    }
  }
};

Visited visit(const int32_t* valid_hw, const bool* padding, int64_t image, int32_t height, int32_t width) {
  Visited visited;
  const Rectangle valid = valid_rectangle(valid_hw, image, height, width);
  for (int32_t y = 0; y < valid.height; ++y) {
    if (padding == nullptr) {
      visited.add(y, 0, valid.width, int64_t(y) * valid.width);
      continue;
    }
    const bool* row = padding + (image * height + y) * width;
    for (int32_t x = 0; x < width;) {
      const int32_t start = x;
      while (x < width && !row[x]) ++x;
      visited.add(y, start, x - start, int64_t(y) * width + start);
      while (x < width && row[x]) ++x;
    }
  }
  return visited;
}

// A call's problem, with what its pointers point to.
struct Call {
  Call(const Tensor& q_content, const Tensor& q_spatial, const Tensor& k_content, const Tensor& k_spatial,
       const std::optional<Tensor>& columns, const Tensor& v, const std::optional<Tensor>& valid_hw,
       const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& keep, double scale,
       double dropout_p) {
    STD_TORCH_CHECK(q_content.dim() == 4 && q_spatial.dim() == 4 && k_content.dim() == 4 && v.dim() == 4,
                    "expected four dimensions of every tensor");
    const ScalarType dtype = q_content.scalar_type();
    const int64_t batch = q_content.size(0), queries = q_content.size(1), heads = q_content.size(2);
    const int64_t keys = k_content.size(1), d = q_content.size(3), ds = q_spatial.size(3), dv = v.size(3);
    const int64_t height = columns ? k_spatial.size(1) : 1, width = columns ? columns->size(1) : keys;
    STD_TORCH_CHECK(height * width == keys && keys < int64_t(1) << 31, "expected H · W keys, fewer than 2^31");
    p.stored = stored_type(q_content);
    p.q_content = strided(q_content, "q_content", batch, queries, heads, d, dtype);
    p.q_spatial = strided(q_spatial, "q_spatial", batch, queries, heads, ds, dtype);
    p.k_content = strided(k_content, "k_content", batch, keys, heads, d, dtype);
    p.spatial = strided(k_spatial, "k_spatial", batch, columns ? height : keys, heads, ds, dtype);
    p.columns = columns ? strided(*columns, "columns", batch, width, heads, ds, dtype) : Tensor4{};
    p.v = strided(v, "v", batch, keys, heads, dv, dtype);
    p.batch = batch, p.queries = queries, p.heads = heads, p.keys = keys, p.height = height, p.width = width;
    p.d = d, p.ds = ds, p.dv = dv, p.scale = scale, p.dropout_p = dropout_p;
    p.keep_words = (keys + 63) / 64 * 2;
    STD_TORCH_CHECK(dropout_p == 0 || (keep && keep->scalar_type() == ScalarType::Int && keep->is_contiguous() &&
                                       keep->numel() == batch * heads * p.keep_words * queries),
                    "keep: expected contiguous int32 [B, heads, 2 · ceil(N / 64), Q] with dropout");
    p.keep = dropout_p > 0 ? static_cast<const uint32_t*>(keep->const_data_ptr()) : nullptr;
    find_keys(valid_hw, key_padding_mask);
  }

  void find_keys(const std::optional<Tensor>& valid_hw, const std::optional<Tensor>& mask) {
    STD_TORCH_CHECK(!valid_hw || (valid_hw->scalar_type() == ScalarType::Int && valid_hw->is_contiguous() &&
                                  valid_hw->numel() == 2 * p.batch),
                    "valid_hw: expected contiguous int32 [B, 2]");
    STD_TORCH_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                              mask->numel() == p.batch * p.keys),
                    "key_padding_mask: expected contiguous bool [B, N]");
    const auto* rectangle = static_cast<const int32_t*>(data_or_null(valid_hw));
    const auto* padding = static_cast<const bool*>(data_or_null(mask));
    const bool is_same = !rectangle && !padding;
    for (int64_t image = 0; image < (is_same ? 1 : p.batch); ++image) {
      visited.push_back(visit(rectangle, padding, image, int32_t(p.height), int32_t(p.width)));
    }
    for (int64_t image = 0; image < p.batch; ++image) {
      const Visited& found = visited[is_same ? 0 : image];
      keys.push_back({found.runs.data(), found.tiles.data(), int64_t(found.tiles.size())});
    }
    p.visited = keys.data();
  }

  Problem p{};
  std::vector<Visited> visited;
  std::vector<Keys> keys;
};

std::tuple<Tensor, Tensor> forward(const Tensor& q_content, const Tensor& q_spatial, const Tensor& k_content,
                                   const Tensor& k_spatial, const std::optional<Tensor>& columns, const Tensor& v,
                                   const std::optional<Tensor>& valid_hw, const std::optional<Tensor>& key_padding_mask,
                                   const std::optional<Tensor>& keep, double scale, double dropout_p) {
  const Call call(q_content, q_spatial, k_content, k_spatial, columns, v, valid_hw, key_padding_mask, keep, scale,
                  dropout_p);
  const Problem& p = call.p;
  Tensor out = torch::stable::new_empty(v, {p.batch, p.queries, p.heads, p.dv});
  const ScalarType lse_type = p.stored == Stored::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor lse = torch::stable::new_empty(v, {p.batch, p.heads, p.queries}, lse_type);
  const Result result{data(out), data(lse)};
  // A head of an image is a task; with too few of them, its queries are split. They do not depend on each other.
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

// Zeros, contiguous.
Tensor zeros_like(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return torch::stable::new_zeros(tensor, std::vector<int64_t>(sizes.begin(), sizes.end()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& q_content, const Tensor& q_spatial, const Tensor& k_content, const Tensor& k_spatial,
    const std::optional<Tensor>& columns, const Tensor& v, const std::optional<Tensor>& valid_hw,
    const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& keep, double scale, double dropout_p,
    const Tensor& grad, const Tensor& out, const Tensor& lse) {
  const Call call(q_content, q_spatial, k_content, k_spatial, columns, v, valid_hw, key_padding_mask, keep, scale,
                  dropout_p);
  const Problem& p = call.p;
  const Tensor upstream = torch::stable::contiguous(grad);
  const ScalarType lse_type = p.stored == Stored::f64 ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* tensor : {&upstream, &out}) {
    strided(*tensor, "grad or out", p.batch, p.queries, p.heads, p.dv, q_content.scalar_type());
  }
  STD_TORCH_CHECK(out.is_contiguous() && lse.is_contiguous() && lse.scalar_type() == lse_type &&
                      lse.numel() == p.batch * p.heads * p.queries,
                  "out and lse: expected those of forward");
  // What belongs to padding is never visited, so its gradient is zero from the start.
  const Tensor grads[] = {zeros_like(q_content), zeros_like(q_spatial), zeros_like(k_content), zeros_like(k_spatial),
                          columns ? zeros_like(*columns) : torch::stable::new_empty(v, {0}), zeros_like(v)};
  const Upstream given{data(upstream), data(out), data(lse)};
  const Gradients gradients{data(grads[0]), data(grads[1]), data(grads[2]), data(grads[3]),
                            columns ? data(grads[4]) : nullptr, data(grads[5])};
  // A head of an image is a task; with few of them its tiles are split. Never by the number of threads: the order of
  // every sum is that of the shapes alone.
  const int64_t groups = p.batch * p.heads, parts = std::max<int64_t>(1, kTasks / groups);
  size_t bytes = 0;
  CONDDETR_CALL(partial_bytes, p, bytes);
  const Tensor partials = torch::stable::new_empty(v, {groups * parts * int64_t(bytes)}, ScalarType::Byte);
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
  library.impl("conditional_attention", TORCH_BOX(&forward));
  library.impl("conditional_attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace conddetr::attn
