"""Dropout before a residual sum: the public function, its checks, and the native operator.

PyTorch generates its random numbers one after the other on one core; in a training step's feed-forward network that
takes longer than the products. On GPUs dropout before a sum is PyTorch's (`add_norm` fuses it with the layer norm). The
operator can apply ReLU too, for `relu_dropout`.
"""

from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.common.seed import fresh_seed
from conddetr.kernels.cpu.dropout import reference

NATIVE = registry.Kernels(devices=("cpu",))
"""Devices of the operator."""
OPERATION = registry.declare("dropout_add", native=NATIVE)


def dropout_add(x: Tensor, residual: Tensor, p: float, backend: str = "auto") -> Tensor:
    """A residual branch after dropout, added to its trunk in one pass over memory; backward recomputes the mask.

    Args:
        x: the branch, floating.
        residual: the trunk, of the shape and device of x.
        p: as in `relu_dropout`; 0: only the sum.
        backend: as in `relu_dropout`.

    Returns:
        The shape of x, the promoted dtype.

    Raises:
        ValueError, RuntimeError: as in `relu_dropout`, and if shapes or devices differ.
    """
    check_dropped(x, p)
    if residual.shape != x.shape or residual.device != x.device:
        actual = f"{tuple(residual.shape)} on {residual.device}"
        raise ValueError(f"residual: expected {tuple(x.shape)} on {x.device} like x, got {actual}.")
    if p == 0:
        return residual + x
    dtype = torch.promote_types(x.dtype, residual.dtype)
    choice = OPERATION.choose(backend, x.device, dtype)
    paths.note("dropout_add", choice.backend, choice.refused)
    if choice.backend == "eager":
        return reference.dropout_add(x, residual, p)
    return drop(x.to(dtype).contiguous(), residual.to(dtype).contiguous(), fresh_seed(x.device), p, False)


def check_dropped(x: Tensor, p: float) -> None:
    """Raises a ValueError if x is not floating or p is not in [0, 1)."""
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}.")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a probability in [0, 1), got {p}.")


def drop(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, relu: bool) -> Tensor:
    """The residual, if there is one, plus x after dropout; or x after ReLU and dropout. Contiguous CPU tensors."""
    return torch.ops.conddetr_native.dropout(x, residual, seed, p, relu)


def _fake(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, relu: bool) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, residual, seed, ctx.p, ctx.relu = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(seed, output if ctx.relu else None)


def _differentiate(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    seed, output = ctx.saved_tensors
    if ctx.relu:
        # A positive output means that x was positive and kept.
        grad_x = torch.ops.aten.threshold_backward(grad, output, 0) / (1 - ctx.p)
    else:
        grad_x = drop(grad.contiguous(), None, seed, ctx.p, False)
    return grad_x, grad if ctx.has_residual else None, None, None, None


operators.register("dropout", fake=_fake, backward=_differentiate, setup=_setup)
