// Linear assignment on the CPU: operator, checks, memory, threads. The mathematics is in kernels.cpp.

#include "common/cpu.h"

#include <algorithm>
#include <vector>

#include "match/kernels.h"

namespace conddetr::match {
namespace {

// Least number of costs that a thread takes at a time: about a millisecond. A training batch with few objects is done
// by then, and waking a thread on a busy machine takes longer.
constexpr int64_t kCostsPerThread = 1 << 19;

// The memory behind a `Workspace`.
class Memory {
 public:
  Memory(int64_t objects, int64_t queries) {
    const int64_t width = (queries + kAlignment - 1) / kAlignment * kAlignment;
    reals_.resize(objects * width + 3 * width + 2 * objects);
    integers_.resize(2 * width + 2 * objects);
    double* real = reals_.data();
    int64_t* integer = integers_.data();
    workspace_ = {take(real, objects * width), take(real, width),    take(real, width),      take(real, width),
                  take(integer, width),        take(integer, width), take(integer, objects), take(integer, objects),
                  take(real, objects),         take(real, objects)};
  }

  const Workspace& workspace() const { return workspace_; }

 private:
  template <typename T>
  static T* take(T*& next, int64_t count) {
    T* const start = next;
    next += count;
    return start;
  }

  std::vector<double> reals_;
  std::vector<int64_t> integers_;
  Workspace workspace_;
};

Tensor linear_assignment(const Tensor& cost, const Tensor& counts) {
  const int64_t rank = cost.dim();
  STD_TORCH_CHECK(cost.is_contiguous() && rank >= 3, "cost: expected contiguous [..., B, N, Q]");
  const int64_t batch = cost.size(rank - 3), capacity = cost.size(rank - 2), queries = cost.size(rank - 1);
  STD_TORCH_CHECK(
      counts.is_contiguous() && counts.dim() == 1 && counts.numel() == batch && counts.scalar_type() == ScalarType::Int,
      "counts: expected contiguous [", batch, "] int32");
  std::vector<int64_t> shape(cost.sizes().begin(), cost.sizes().end());
  shape.erase(shape.end() - 2);
  Tensor assignment = torch::stable::new_empty(cost, shape, ScalarType::Long);
  if (assignment.numel() == 0) return assignment;

  const Stored stored = stored_type(cost);
  const char* costs = static_cast<const char*>(cost.const_data_ptr());
  const int32_t* objects = static_cast<const int32_t*>(counts.const_data_ptr());
  int64_t* out = static_cast<int64_t*>(data(assignment));
  // Clamped, as in the other kernels: a wrong count never reads outside.
  const int64_t most = std::min(capacity, queries);
  const int64_t matrix = capacity * queries, problems = assignment.numel() / queries;
  const int64_t per_thread = std::max<int64_t>(1, kCostsPerThread / std::max<int64_t>(1, matrix));
  torch::stable::parallel_for(0, problems, per_thread, [&](int64_t begin, int64_t end) {
    const Memory memory(most, queries);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t count = std::clamp<int64_t>(objects[i % batch], 0, most);
      const Problem problem{costs + i * matrix * int64_t(cost.element_size()), stored, count, queries};
      CONDDETR_CALL(solve, problem, memory.workspace(), out + i * queries);
    }
  });
  return assignment;
}

STABLE_TORCH_LIBRARY_IMPL(conddetr_native, CPU, library) {
  library.impl("linear_assignment", TORCH_BOX(&linear_assignment));
}

}  // namespace
}  // namespace conddetr::match
