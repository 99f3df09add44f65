"""Losses of matched boxes: the public function, its checks, and the operator behind the kernels.

Autocast changes nothing here: all arithmetic is float32, or float64 for float64 inputs.
"""

from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.boxes import reference

OPERATION = registry.declare("matched_box_loss", triton=registry.Kernels())


def matched_box_loss(boxes: Tensor, objects: Tensor, assignment: Tensor, backend: str = "auto") -> Tensor:
    """Sums over the matched pairs of |a - b| and of 1 - GIoU(a, b) (DETR, section 3.1).

    Args:
        boxes: [L, B, Q, 4] predictions as (cx, cy, w, h) with sizes ≥ 0, floating.
        objects: [B, N, 4] in the same format, floating; gets no gradient.
        assignment: [L, B, Q] int64, the object of its image that each prediction is matched with, -1 for none.
        backend: `auto`, `triton` or `eager`.

    Returns:
        [2, L], L1 and GIoU loss, float32 (float64 if `boxes` is). They and their gradients are finite for finite
        boxes, unless the L1 distance itself exceeds the dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the tensor, the expected and the actual value.
        RuntimeError: the requested backend cannot run here; says why.
    """
    _check(boxes, objects, assignment)
    choice = OPERATION.choose(backend, boxes.device, boxes.dtype)
    if choice.backend == "eager" or boxes.numel() == 0:
        paths.note("matched_box_loss", "eager", choice.refused)
        return reference.matched_box_loss(boxes, objects.detach(), assignment)
    paths.note("matched_box_loss", choice.backend)
    return torch.ops.conddetr.matched_box_loss(boxes.contiguous(), objects.contiguous(), assignment.contiguous())


def _check(boxes: Tensor, objects: Tensor, assignment: Tensor) -> None:
    if boxes.dim() != 4 or boxes.shape[-1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"boxes: expected [L, B, Q, 4], floating, got {tuple(boxes.shape)} {boxes.dtype}.")
    expected = (boxes.shape[1], objects.shape[1] if objects.dim() == 3 else "N", 4)
    if tuple(objects.shape) != expected or not objects.is_floating_point():
        raise ValueError(f"objects: expected {expected}, floating, got {tuple(objects.shape)} {objects.dtype}.")
    if assignment.shape != boxes.shape[:-1] or assignment.dtype != torch.int64:
        raise ValueError(
            f"assignment: expected {tuple(boxes.shape[:-1])} torch.int64, "
            f"got {tuple(assignment.shape)} {assignment.dtype}."
        )
    for name, tensor in (("objects", objects), ("assignment", assignment)):
        if tensor.device != boxes.device:
            raise ValueError(f"{name}: expected device {boxes.device} like boxes, got {tensor.device}.")


def _fake_forward(boxes: Tensor, objects: Tensor, assignment: Tensor) -> Tensor:
    return boxes.new_empty((2, boxes.shape[0]), dtype=torch.float32)


def _fake_backward(grad: Tensor, boxes: Tensor, objects: Tensor, assignment: Tensor) -> Tensor:
    return torch.empty_like(boxes)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    return ops.matched_box_loss_backward(grad.contiguous(), *ctx.saved_tensors), None, None


operators.register(
    "matched_box_loss",
    "(Tensor boxes, Tensor objects, Tensor assignment) -> Tensor",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake_forward,
    backward=_differentiate,
    setup=_setup,
)
operators.register(
    "matched_box_loss_backward",
    "(Tensor grad, Tensor boxes, Tensor objects, Tensor assignment) -> Tensor",
    launch=operators.launcher(__package__, "backward"),
    fake=_fake_backward,
    is_gradient=True,
)
