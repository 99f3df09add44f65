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
    """Percentage of wrong classes among matched predictions, and the error of the number of objects.

    As in the official code, a prediction counts as an object if its best class is not the last logit. This counts
    objects in DETR, whose last logit is no-object; in Conditional DETR the number has little meaning.

    Args:
        logits: [L, B, Q, K], floating.
        assignment: [L, B, Q] int64, index of the object that each prediction is matched with, -1 for none.
        labels: [B, N] int64, the classes of the objects.
        counts: [B] int32, number of objects of each image, at most N.
        backend: `auto`, `triton` (two launches) or `eager`.

    Returns:
        The percentage of the last layer's matched predictions whose best class is not their object's, a scalar, 100 if
        none is matched; and for each layer the mean over images of |predicted - actual| objects, [L]. Both are float32
        (float64 if `logits` is).

    Raises:
        ValueError: shapes, dtypes or devices do not match; names the tensor, the expected and the actual value.
        RuntimeError: the requested backend cannot run here; gives the reason.
    """
    _check(logits, assignment, labels, counts)
    choice = OPERATION.choose(backend, logits.device, logits.dtype)
    if choice.backend == "eager" or logits.numel() == 0:
        paths.note("prediction_errors", "eager", choice.refused)
        return reference.prediction_errors(logits, assignment, labels, counts)
    paths.note("prediction_errors", choice.backend)
    tensors = [x.contiguous() for x in (logits, assignment, labels, counts)]
    errors = torch.ops.conddetr.prediction_errors(*tensors)
    return errors[-1], errors[:-1]


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
