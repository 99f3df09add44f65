// The schemas of the operators: those of `torch.ops.conddetr.*` (kernels/*/op.py), word for word.
#pragma once

#include <string>

#include "attn/inputs.h"

namespace conddetr {

template <typename Library>
void define_operators(Library& library) {
  const std::string attention_inputs = attn::schema_of_inputs();
  library.def(("conditional_attention(" + attention_inputs + ") -> (Tensor out, Tensor lse)").c_str());
  library.def(("conditional_attention_backward(" + attention_inputs +
               ", Tensor grad, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
                  .c_str());
  library.def("convolution_3x3(Tensor x, Tensor weight, Tensor? bias, bool transposed, bool relu) -> Tensor");
  library.def("convolution_3x3_weight(Tensor x, Tensor grad) -> Tensor");
  library.def("dropout(Tensor x, Tensor? residual, Tensor seed, float p, bool relu) -> Tensor");
  library.def("dropout_bits(Tensor seed, SymInt count, int threshold) -> Tensor");
  library.def("linear_assignment(Tensor cost, Tensor counts) -> Tensor");
  library.def("sine_embedding(Tensor points, Tensor? transform, int dim, float temperature) -> Tensor");
  library.def(
      "sine_embedding_backward(Tensor grad, Tensor points, Tensor? transform, int dim, float temperature) "
      "-> (Tensor, Tensor)");
}

}  // namespace conddetr
