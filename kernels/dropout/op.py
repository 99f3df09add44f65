"""Dropout with the operation beside it: the public functions, their checks, and the operator behind the kernels.

For CPUs, where PyTorch draws its random numbers one after the other on one core: on a training step's feed-forward
network that takes longer than the products. On GPUs PyTorch's dropout is one kernel, and `torch.compile` fuses it.
"""

import torch
from torch import Tensor

from conddetr.kernels import native, paths, registry
from conddetr.kernels.dropout import reference


def relu_dropout(x: Tensor, p: float, backend: str = "auto") -> Tensor:
    """ReLU and dropout in one pass over memory, as in a feed-forward network; backward reads the result alone.

    Args:
        x: any shape, floating.
        p: probability, in [0, 1), that an element is dropped; 0: ReLU alone.
        backend: `auto`, `native` (on CPUs) or `eager`.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: p is out of range, or x is not floating.
        RuntimeError: the requested backend can not run here; says why.
    """
    _check(x, p)
    if p == 0:
        return x.relu()
    choice = choose(backend, x.device, x.dtype)
    paths.note("relu_dropout", choice)
    if choice == "eager":
        return reference.relu_dropout(x, p)
    return _drop(x.contiguous(), None, _seed(), p, True)


def dropout_add(x: Tensor, residual: Tensor, p: float, backend: str = "auto") -> Tensor:
    """A residual branch after dropout, added to its trunk in one pass over memory; backward draws the mask again.

    Args:
        x: the branch, floating.
        residual: the trunk, of the shape and device of x.
        p: as in `relu_dropout`; 0: the sum alone.
        backend: as in `relu_dropout`.

    Returns:
        The shape of x, the promoted dtype.

    Raises:
        ValueError, RuntimeError: as `relu_dropout`, and where shapes or devices differ.
    """
    _check(x, p)
    if residual.shape != x.shape or residual.device != x.device:
        found = f"{tuple(residual.shape)} on {residual.device}"
        raise ValueError(f"residual: expected {tuple(x.shape)} on {x.device} as of x, got {found}.")
    if p == 0:
        return residual + x
    dtype = torch.promote_types(x.dtype, residual.dtype)
    choice = choose(backend, x.device, dtype)
    paths.note("dropout_add", choice)
    if choice == "eager":
        return reference.dropout_add(x, residual, p)
    return _drop(x.to(dtype).contiguous(), residual.to(dtype).contiguous(), _seed(), p, False)


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation for tensors of a device and dtype."""
    return registry.choose(
        backend, device, dtype, registry.NATIVE_ALONE if device.type == "cpu" else ("eager",)
    ).backend


def _check(x: Tensor, p: float) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}.")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a probability in [0, 1), got {p}.")


def _seed() -> Tensor:
    """From torch's generator: repeatable, and replayed by checkpointing."""
    return torch.randint(2**31 - 1, (1,))


def _drop(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, relu: bool) -> Tensor:
    return torch.ops.conddetr_native.dropout(x, residual, seed, p, relu)


def _fake(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, relu: bool) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, residual, seed, ctx.p, ctx.relu = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(seed, output if ctx.relu else None)


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    seed, output = ctx.saved_tensors
    if ctx.relu:
        # What is above zero was, and was kept.
        of_x = torch.ops.aten.threshold_backward(grad, output, 0) / (1 - ctx.p)
    else:
        of_x = _drop(grad.contiguous(), None, seed, ctx.p, False)
    return of_x, grad if ctx.has_residual else None, None, None, None


if native.NOT_LOADED is None:
    torch.library.register_fake("conddetr_native::dropout", _fake)
    torch.library.register_autograd("conddetr_native::dropout", _differentiate, setup_context=_setup)
