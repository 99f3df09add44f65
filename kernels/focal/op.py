"""Focal loss: the public function, its checks, and the operator behind the kernels.

Under autocast nothing is cast: all arithmetic is float32 (float64 for float64) whatever comes in.
"""

import torch
from torch import Tensor

from conddetr.kernels import paths, registry
from conddetr.kernels.focal import reference


def focal_loss(
    logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0, backend: str = "auto"
) -> Tensor:
    """Sigmoid focal loss (Lin et al., ICCV 2017), summed over predictions and classes.

    Each class is a binary problem with the loss weight · (1 - p)^γ · -log p, p the probability of the right answer.

    Args:
        logits: [L, ..., K], floating.
        target: [L, ...] int64, the class in [0, K) that is there, -1 for none. Values are not looked at.
        alpha: weight of the class that is there, 1 - alpha of the others; negative: no weights.
        gamma: how much easy examples count less, at least 0.
        backend: `auto`, `triton` or `eager`.

    Returns:
        [L] float32 (float64 if `logits` is). It and its gradient are finite for finite logits, unless the sum itself
        exceeds the dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the tensor, what was expected and what was found.
        RuntimeError: the requested backend can not run here; says why.
    """
    _check(logits, target, gamma)
    choice = registry.choose(backend, logits.device, logits.dtype, registry.WITHOUT_NATIVE)
    if choice.backend == "eager" or logits.numel() == 0:
        paths.note("focal_loss", "eager", choice.refused)
        return reference.focal_loss(logits, target, alpha, gamma)
    paths.note("focal_loss", choice.backend)
    return torch.ops.conddetr.focal_loss(logits.contiguous(), target.contiguous(), alpha, gamma)


def _check(logits: Tensor, target: Tensor, gamma: float) -> None:
    if logits.dim() < 2 or not logits.is_floating_point():
        raise ValueError(f"logits: expected [L, ..., K], floating, got {tuple(logits.shape)} {logits.dtype}.")
    if target.shape != logits.shape[:-1] or target.dtype != torch.int64:
        raise ValueError(
            f"target: expected {tuple(logits.shape[:-1])} torch.int64, got {tuple(target.shape)} {target.dtype}."
        )
    if target.device != logits.device:
        raise ValueError(f"target: expected device {logits.device} as of logits, got {target.device}.")
    if gamma < 0:
        raise ValueError(f"gamma: expected at least 0, got {gamma}.")


@torch.library.custom_op(
    "conddetr::focal_loss", mutates_args=(), schema="(Tensor logits, Tensor target, float alpha, float gamma) -> Tensor"
)
@registry.on_their_device
def _forward(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    from conddetr.kernels.focal import triton

    return triton.forward(logits, target, alpha, gamma)


@_forward.register_fake
def _(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "conddetr::focal_loss_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor target, float alpha, float gamma) -> Tensor",
)
@registry.on_their_device
def _backward(grad: Tensor, logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    from conddetr.kernels.focal import triton

    return triton.backward(grad.contiguous(), logits, target, alpha, gamma)


@_backward.register_fake
def _(grad: Tensor, logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    return torch.empty_like(logits)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    logits, target, ctx.alpha, ctx.gamma = inputs
    ctx.save_for_backward(logits, target)


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    logits, target = ctx.saved_tensors
    return torch.ops.conddetr.focal_loss_backward(grad, logits, target, ctx.alpha, ctx.gamma), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)
registry.once_differentiable("conddetr::focal_loss_backward")
