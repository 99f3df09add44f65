// The kernels' table: which one runs, in how many blocks, with how much shared memory.
#pragma once

#include <cstdlib>
#include <cstring>

#include "attn/cuda/backward_key.cuh"
#include "attn/cuda/backward_query.cuh"
#include "attn/cuda/forward.cuh"
#include "attn/cuda/hopper/backward_key.cuh"
#include "attn/cuda/hopper/backward_query.cuh"
#include "attn/cuda/hopper/forward.cuh"
#include "attn/cuda/prepare.h"

namespace conddetr::attn {
namespace {

// The largest grid of the presets, 1333 × 1333 pixels at stride 16, fits GPUs with the smallest shared memory.
static_assert(QueryRows<bf16, true>::bytes(84, 84) <= 99 * 1024);

// Whether the environment allows the kernels for Hopper: yes, unless CONDDETR_HOPPER is 0 (for comparisons).
bool allows_hopper() {
  const char* value = std::getenv("CONDDETR_HOPPER");
  return value == nullptr || std::strcmp(value, "0") != 0;
}

// The kernel for Hopper if it can run, else the one for any GPU. Both have the same blocks.
template <typename... Parameters>
auto fitting(void (*any)(Parameters...), void (*hopper)(Parameters...), const Inputs& inputs) {
  return allows_hopper() && has_warpgroups(hopper, inputs.v) ? hopper : any;
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

}  // namespace
}  // namespace conddetr::attn
