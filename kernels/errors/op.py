"""Errors of predictions: the public function, its checks, and the operator behind the kernels. There is no gradient."""

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.errors import reference

OPERATION = registry.declare("prediction_errors", triton=registry.Kernels())


@torch.no_grad()
def prediction_errors(
    logits: Tensor, assignment: Tensor, labels: Tensor, counts: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """How many matched classes are wrong, and by how many objects their number is off.

    As in the official code, predictions count as objects whose best class is not the last logit; that counts objects
    in DETR, where the last is no-object, and says little in Conditional DETR.

    Args:
        logits: [L, B, Q, K], floating.
        assignment: [L, B, Q] int64, which object of its image each prediction is matched with, -1 for none.
        labels: [B, N] int64, the classes of the objects.
        counts: [B] int32, how many of the N are objects of that image.
        backend: `auto`, `triton` (two launches) or `eager`.

    Returns:
        Of the last layer the matched predictions whose best class is another than their object's, in percent, 100 if
        none is matched: a scalar; and per layer the mean over images of |predicted - actual| objects, [L]. Both
        float32 (float64 if `logits` is).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the tensor, the expected and the actual value.
        RuntimeError: the requested backend cannot run here; says why.
    """
    _check(logits, assignment, labels, counts)
    choice = OPERATION.choose(backend, logits.device, logits.dtype)
    if choice.backend == "eager" or logits.numel() == 0:
        paths.note("prediction_errors", "eager", choice.refused)
        return reference.prediction_errors(logits, assignment, labels, counts)
    paths.note("prediction_errors", choice.backend)
    tensors = [x.contiguous() for x in (logits, assignment, labels, counts)]
    found = torch.ops.conddetr.prediction_errors(*tensors)
    return found[-1], found[:-1]


def _check(logits: Tensor, assignment: Tensor, labels: Tensor, counts: Tensor) -> None:
    if logits.dim() != 4 or not logits.is_floating_point():
        raise ValueError(f"logits: expected [L, B, Q, K], floating, got {tuple(logits.shape)} {logits.dtype}.")
    batch = logits.shape[1]
    capacity = labels.shape[1] if labels.dim() == 2 else "N"
    for name, tensor, shape, dtype in (
        ("assignment", assignment, tuple(logits.shape[:3]), torch.int64),
        ("labels", labels, (batch, capacity), torch.int64),
        ("counts", counts, (batch,), torch.int32),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name}: expected {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}.")
        if tensor.device != logits.device:
            raise ValueError(f"{name}: expected device {logits.device} as of logits, got {tensor.device}.")


def _fake(logits: Tensor, assignment: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0] + 1, dtype=torch.float32)


operators.register(
    "prediction_errors",
    "(Tensor logits, Tensor assignment, Tensor labels, Tensor counts) -> Tensor",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake,
)
