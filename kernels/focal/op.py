"""Focal loss: the public function, its checks, and the operator behind the kernels.

Autocast changes nothing here: all arithmetic is float32, or float64 for float64 inputs.
"""

from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.focal import reference

OPERATION = registry.declare("focal_loss", triton=registry.Kernels())


def focal_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    backend: str = "auto",
    *,
    labels: Tensor | None = None,
) -> Tensor:
    """Sigmoid focal loss (Lin et al., ICCV 2017), summed over predictions and classes.

    Each class is a binary problem with the loss weight · (1 - p)^γ · -log p, p the probability of the right answer.

    Args:
        logits: [L, ..., K], floating.
        target: [L, ...] int64, the class in [0, K) that is present, -1 for none. Values are not checked.
        alpha: weight of the present class, 1 - alpha of the absent ones; negative: no weights.
        gamma: how strongly easy examples are weighted down, at least 0.
        backend: `auto`, `triton` or `eager`.
        labels: [B, N] int64 in [0, K), the classes of N objects of each image: `target` [L, B, Q] is then the index of
            an object of its image, or -1. The kernel looks up the class, which saves five launches.

    Returns:
        [L] float32 (float64 if `logits` is). It and its gradient are finite for finite logits, unless the sum itself
        exceeds the dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the tensor, the expected and the actual value.
        RuntimeError: the requested backend cannot run here; says why.
    """
    _check(logits, target, gamma)
    _check_labels(labels, target)
    choice = OPERATION.choose(backend, logits.device, logits.dtype)
    if choice.backend == "eager" or logits.numel() == 0:
        paths.note("focal_loss", "eager", choice.refused)
        if labels is not None:
            target = reference.matched_classes(target, labels)
        return reference.focal_loss(logits, target, alpha, gamma)
    paths.note("focal_loss", choice.backend)
    labels = None if labels is None else labels.contiguous()
    return torch.ops.conddetr.focal_loss(logits.contiguous(), target.contiguous(), labels, alpha, gamma)


def _check(logits: Tensor, target: Tensor, gamma: float) -> None:
    if logits.dim() < 2 or not logits.is_floating_point():
        raise ValueError(f"logits: expected [L, ..., K], floating, got {tuple(logits.shape)} {logits.dtype}.")
    if target.shape != logits.shape[:-1] or target.dtype != torch.int64:
        raise ValueError(
            f"target: expected {tuple(logits.shape[:-1])} torch.int64, got {tuple(target.shape)} {target.dtype}."
        )
    if target.device != logits.device:
        raise ValueError(f"target: expected device {logits.device} like logits, got {target.device}.")
    if gamma < 0:
        raise ValueError(f"gamma: expected at least 0, got {gamma}.")


def _check_labels(labels: Tensor | None, target: Tensor) -> None:
    if labels is None:
        return
    batch = target.shape[1] if target.dim() == 3 else "B"
    if target.dim() != 3 or labels.dim() != 2 or labels.shape[0] != batch or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected [{batch}, N] torch.int64 with target [L, B, Q], got {tuple(labels.shape)} "
            f"{labels.dtype} with target {tuple(target.shape)}."
        )
    if labels.device != target.device:
        raise ValueError(f"labels: expected device {target.device} like target, got {labels.device}.")


def _fake_forward(logits: Tensor, target: Tensor, labels: Tensor | None, alpha: float, gamma: float) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _fake_backward(grad: Tensor, logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.alpha, ctx.gamma = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    grad = ops.focal_loss_backward(grad.contiguous(), *ctx.saved_tensors, ctx.alpha, ctx.gamma)
    return grad, None, None, None, None


_INPUTS = "Tensor logits, Tensor target, Tensor? labels, float alpha, float gamma"
operators.register(
    "focal_loss",
    f"({_INPUTS}) -> Tensor",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake_forward,
    backward=_differentiate,
    setup=_setup,
)
operators.register(
    "focal_loss_backward",
    f"(Tensor grad, {_INPUTS}) -> Tensor",
    launch=operators.launcher(__package__, "backward"),
    fake=_fake_backward,
    is_gradient=True,
)
