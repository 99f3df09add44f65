// The inputs of conditional attention, written once: for forward and backward, on the CPU and on GPUs, and for the
// schema. kernels/attn/op.py documents them.
#pragma once

#include <stdint.h>

#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace conddetr::attn {

using torch::stable::Tensor;

// Each with its type here and in the schema, in the order of the schema.
// clang-format off
#define CONDDETR_ATTENTION_INPUTS(input)                    \
  input(Tensor, "Tensor", q_content)                        \
  input(Tensor, "Tensor", q_spatial)                        \
  input(Tensor, "Tensor", k_content)                        \
  input(Tensor, "Tensor", k_spatial)                        \
  input(std::optional<Tensor>, "Tensor?", columns)          \
  input(Tensor, "Tensor", v)                                \
  input(std::optional<Tensor>, "Tensor?", valid_cells)         \
  input(std::optional<Tensor>, "Tensor?", key_padding_mask) \
  input(std::optional<Tensor>, "Tensor?", keep)             \
  input(double, "float", scale)                             \
  input(double, "float", dropout_p)

#define CONDDETR_FIELD(type, in_schema, name) type name;
#define CONDDETR_PARAMETER(type, in_schema, name) const type& name,
#define CONDDETR_ARGUMENT(type, in_schema, name) name,
#define CONDDETR_TEXT(type, in_schema, name) in_schema " " #name,
// clang-format on

struct Inputs {
  CONDDETR_ATTENTION_INPUTS(CONDDETR_FIELD)

  int64_t batch() const { return q_content.size(0); }
  int64_t queries() const { return q_content.size(1); }
  int64_t heads() const { return q_content.size(2); }
  int64_t keys() const { return k_content.size(1); }
  // Dense spatial keys are a grid of one row.
  int64_t height() const { return columns ? k_spatial.size(1) : 1; }
  int64_t width() const { return columns ? columns->size(1) : keys(); }
  // Words of `keep`: two of 32 keys for each 64 keys.
  int64_t keep_words() const { return (keys() + 63) / 64 * 2; }
};

// The inputs' part of a schema.
inline std::string schema_of_inputs() {
  std::string schema;
  for (const char* input : {CONDDETR_ATTENTION_INPUTS(CONDDETR_TEXT)}) {
    schema += (schema.empty() ? "" : ", ") + std::string(input);
  }
  return schema;
}

// An operator that takes the inputs, and perhaps more tensors, with the signature that the library calls: each input
// is a separate argument. Register it as TORCH_BOX(&Unpacked<operator>::call).
template <auto kOperator>
struct Unpacked;
template <typename Result, typename... More, Result (*kOperator)(Inputs, const More&...)>
struct Unpacked<kOperator> {
  static Result call(CONDDETR_ATTENTION_INPUTS(CONDDETR_PARAMETER) const More&... more) {
    return kOperator({CONDDETR_ATTENTION_INPUTS(CONDDETR_ARGUMENT)}, more...);
  }
};

#undef CONDDETR_FIELD
#undef CONDDETR_PARAMETER
#undef CONDDETR_ARGUMENT
#undef CONDDETR_TEXT

}  // namespace conddetr::attn
