"""C source of stubs for cuBLAS, cuDNN, NCCL and other CUDA libraries that PyTorch calls; they only return success.

The functions' names are read from PyTorch's libraries, so that every release gets the stubs that it needs. The stubs
are loaded before the CUDA libraries and replace their functions; functions without a stub stay the libraries'.
"""

import re
import subprocess
from pathlib import Path

LIBRARIES = r"cublas|cudnn|cusolver|cusparse|cufft|curand|nccl"
WITHOUT_STUB = r"GetVersion|GetErrorString|GetLastError|GetStatusString|GetStatusName|GetProperty"
"""Functions that need no GPU."""
BY_HAND = (
    r"AlgoGetHeuristic|cudnnBackend|WorkspaceSize|ReserveSpaceSize|DropoutGetStatesSize|ncclComm(Init|Count|GetAsync)"
)
"""Functions that return more than a status: written below, or never called."""
COUNTED = (
    r"cublasLtMatmul|cublas\w*(gemm|gemv|dot[cu]?_v2|dotex|trsm)\w*"
    r"|cudnn(Convolution|BatchNormalization|Pooling|RNN|CTCLoss|SpatialTf)\w+"
    r"|nccl(All\w+|Broadcast|Bcast|Reduce\w*|Gather|Send|Recv)"
)
"""Whole names of products, cuDNN's older functions and collectives: at least one launch each. Functions that only
describe a product begin with its name too. cuDNN's graphs are counted below.
"""
HEADER = r"""
#include <stdlib.h>
#include <string.h>
extern void null_gpu_library_call(const char *name);

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int requested, char *results, int *returned) {
  memset(results, 0, 96);
  if (returned) *returned = 1;
  return 0;
}

/* A communicator stores only the number of ranks. An identifier is passed by value, in 128 bytes (nccl.h). */
typedef struct { char bytes[128]; } Identifier;
int ncclCommInitRankConfig(int **made, int ranks, Identifier identifier, int rank, void *configuration) {
  *made = calloc(1, 256);
  **made = ranks;
  return 0;
}
int ncclCommInitRank(int **made, int ranks, Identifier identifier, int rank) {
  return ncclCommInitRankConfig(made, ranks, identifier, rank, NULL);
}
int ncclCommCount(const int *communicator, int *ranks) { *ranks = *communicator; return 0; }
int ncclCommGetAsyncError(void *communicator, int *error) { *error = 0; return 0; }

int cudnnDropoutGetStatesSize(void *handle, size_t *size) { *size = 0; return 0; }

int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    void *handle, int mode, int operation, void *x, void *z, void *y, void *scale, void *activation, size_t *size) {
  *size = 0;
  return 0;
}

int cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    void *handle, int mode, int operation, void *x, void *y, void *dy, void *dz, void *dx, void *scale,
    void *activation, size_t *size) {
  *size = 0;
  return 0;
}

int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    void *handle, int mode, int operation, void *activation, void *x, size_t *size) {
  *size = 0;
  return 0;
}

/* cuDNN's graphs: there is one engine, which supports everything, needs no workspace and has no notes. */
int cudnnBackendCreateDescriptor(int type, void **made) { *made = calloc(1, 256); return 0; }
int cudnnBackendDestroyDescriptor(void *descriptor) { free(descriptor); return 0; }
int cudnnBackendFinalize(void *descriptor) { return 0; }
int cudnnBackendSetAttribute(void *descriptor, int name, int type, long count, const void *value) { return 0; }
int cudnnBackendExecute(void *handle, void *plan, void *variants) { null_gpu_library_call("cudnn"); return 0; }

int cudnnBackendGetAttribute(void *descriptor, int name, int type, long count, long *returned, void *value) {
  /* Types 2 to 5 are numbers, 15 is a descriptor (cudnn_backend.h). */
  static const int bytes[] = {0, 0, 1, 8, 4, 8};
  const int is_number = type >= 2 && type <= 5;
  if (returned) *returned = is_number || type == 15;
  if (value && count > 0 && is_number) memset(value, 0, bytes[type]);
  return 0;
}
"""


def source(torch_libraries: Path) -> str:
    """The C source for the PyTorch whose libraries are in a folder."""
    return HEADER + "\n".join(_stub(name) for name in sorted(_called(torch_libraries))) + "\n"


def _called(torch_libraries: Path) -> set[str]:
    """The functions of CUDA libraries that PyTorch needs a stub for."""
    command = ["nm", "--dynamic", "--undefined-only", *sorted(torch_libraries.glob("*.so"))]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = set(re.findall(rf"\bU ((?:{LIBRARIES})\w+)", symbols))
    return {name for name in names if not re.search(f"{WITHOUT_STUB}|{BY_HAND}", name)}


def _stub(name: str) -> str:
    """Stub of a function: products and collectives are counted, handles created and freed; all return success."""
    if re.fullmatch(COUNTED, name, re.IGNORECASE):
        return f'int {name}() {{ null_gpu_library_call("{name}"); return 0; }}'
    if "Create" in name:
        return f"int {name}(void **made) {{ if (made) *made = calloc(1, 256); return 0; }}"
    if "Destroy" in name:
        return f"int {name}(void *handle) {{ free(handle); return 0; }}"
    return f"int {name}() {{ return 0; }}"
