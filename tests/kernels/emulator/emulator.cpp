// The CUDA operators on a CPU, as torch.ops.conddetr_emulated; see common/warp.cuh in this folder.

#include "attn/cuda.cu"
#include "bits/cuda.cu"
#include "schemas.h"
#include "sine/cuda.cu"

STABLE_TORCH_LIBRARY(conddetr_emulated, library) { conddetr::define_operators(library); }
