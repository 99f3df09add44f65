"""Pooling of a map that needs no gradient: the public function, its checks, and the operator behind the kernel.

PyTorch's own pooling writes the index of each maximum even if no gradient is needed: 8 bytes for every 2 of the result
in half precision.
"""

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.pool import reference


def max_pool(x: Tensor, backend: str = "auto") -> Tensor:
    """The largest value of each window of 3×3 cells, stride 2, padding 1, as behind the stem of a ResNet.

    Args:
        x: [B, C, H, W], floating.
        backend: `auto`, `triton`, which takes maps in channels-last and records no gradient, or `eager`.

    Returns:
        [B, C, ⌈H/2⌉, ⌈W/2⌉] in the dtype and layout of x. A window with a NaN gives NaN. Gradients are recorded;
        `auto` then uses PyTorch's pooling.

    Raises:
        ValueError: x is not a floating map with cells.
        RuntimeError: the requested backend cannot run here; says why.
    """
    if x.dim() != 4 or 0 in x.shape[1:] or not x.is_floating_point():
        raise ValueError(f"x: expected [B, C, H, W] with cells, floating, got {tuple(x.shape)} {x.dtype}.")
    choice = OPERATION.choose(backend, x.device, x.dtype, x)
    paths.note("max_pool", choice.backend, choice.refused)
    return reference.max_pool(x) if choice.backend == "eager" else torch.ops.conddetr.max_pool(x)


def _why_not(x: Tensor) -> str | None:
    """Why the kernel cannot pool x; None if it can."""
    if x.requires_grad and torch.is_grad_enabled():
        return "its kernel has no gradient, and x needs one."
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a graph of PyTorch's own operators is traced."
    if type(x) is not Tensor or len(x) == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not an ordinary tensor in channels-last, or is empty."
    return None


OPERATION = registry.declare("max_pool", triton=registry.Kernels(why_not=_why_not))


def _fake(x: Tensor) -> Tensor:
    shape = (*x.shape[:2], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


operators.register("max_pool", "(Tensor x) -> Tensor", launch=operators.launcher(__package__, "max_pool"), fake=_fake)
