// The CUDA operators on a CPU, as torch.ops.conddetr_emulated; see common/warp.cuh beside this.

#include "attn/cuda.cu"
#include "bits/cuda.cu"
#include "sine/cuda.cu"

#define CONDDETR_ATTENTION_INPUTS                                                                       \
  "Tensor q_content, Tensor q_spatial, Tensor k_content, Tensor k_spatial, Tensor? columns, Tensor v, " \
  "Tensor? valid_hw, Tensor? key_padding_mask, Tensor? keep, float scale, float dropout_p"

STABLE_TORCH_LIBRARY(conddetr_emulated, library) {
  library.def("dropout_bits(Tensor seed, SymInt count, int threshold) -> Tensor");
  library.def("sine_embedding(Tensor points, Tensor? transform, int dim, float temperature) -> Tensor");
  library.def(
      "sine_embedding_backward(Tensor grad, Tensor points, Tensor? transform, int dim, float temperature) "
      "-> (Tensor, Tensor)");
  library.def("conditional_attention(" CONDDETR_ATTENTION_INPUTS ") -> (Tensor out, Tensor lse)");
  library.def("conditional_attention_backward(" CONDDETR_ATTENTION_INPUTS
              ", Tensor grad, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
