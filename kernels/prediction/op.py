"""Predicted boxes: the public function, its checks, and the operator behind the kernels."""

from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.prediction import reference

OPERATION = registry.declare("predicted_boxes", triton=registry.Kernels())


def predicted_boxes(offsets: Tensor, points: Tensor, backend: str = "auto") -> Tensor:
    """Boxes from offsets, to whose centres reference points are added before the sigmoid (section 3.2).

    Args:
        offsets: [L, B, Q, 4] of (cx, cy, w, h), any real numbers, floating.
        points: [Q, 2] as (x, y) in [0, 1], floating, on the same device.
        backend: `auto`, `triton` (one launch each way) or `eager`.

    Returns:
        [L, B, Q, 4] as (cx, cy, w, h) in [0, 1], of the promoted dtype. Kernels compute in float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the tensor, the expected and the actual value.
        RuntimeError: the requested backend cannot run here; says why.
    """
    _check(offsets, points)
    dtype = torch.promote_types(offsets.dtype, points.dtype)
    choice = OPERATION.choose(backend, offsets.device, dtype)
    if choice.backend == "eager" or offsets.numel() == 0:
        paths.note("predicted_boxes", "eager", choice.refused)
        return reference.predicted_boxes(offsets, points)
    paths.note("predicted_boxes", choice.backend)
    return torch.ops.conddetr.predicted_boxes(offsets.contiguous(), points.contiguous())


def _check(offsets: Tensor, points: Tensor) -> None:
    if offsets.dim() != 4 or offsets.shape[-1] != 4 or not offsets.is_floating_point():
        raise ValueError(f"offsets: expected [L, B, Q, 4], floating, got {tuple(offsets.shape)} {offsets.dtype}.")
    expected = (offsets.shape[2], 2)
    if tuple(points.shape) != expected or not points.is_floating_point():
        raise ValueError(f"points: expected {expected}, floating, got {tuple(points.shape)} {points.dtype}.")
    if points.device != offsets.device:
        raise ValueError(f"points: expected device {offsets.device} like offsets, got {points.device}.")


def _fake_forward(offsets: Tensor, points: Tensor) -> Tensor:
    return offsets.new_empty(offsets.shape, dtype=torch.promote_types(offsets.dtype, points.dtype))


def _fake_backward(grad: Tensor, boxes: Tensor, points: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(boxes, dtype=dtype), torch.empty_like(points)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    offsets, points = inputs
    ctx.dtype = offsets.dtype
    ctx.save_for_backward(output, points)


def _differentiate(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return ops.predicted_boxes_backward(grad.contiguous(), *ctx.saved_tensors, ctx.dtype)


operators.register(
    "predicted_boxes",
    "(Tensor offsets, Tensor points) -> Tensor",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake_forward,
    backward=_differentiate,
    setup=_setup,
)
operators.register(
    "predicted_boxes_backward",
    "(Tensor grad, Tensor boxes, Tensor points, ScalarType dtype) -> (Tensor, Tensor)",
    launch=operators.launcher(__package__, "backward"),
    fake=_fake_backward,
    is_gradient=True,
)
