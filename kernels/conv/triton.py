"""Kernels around a convolution on a GPU, each one pass over the map.

Forward: bias, residual sum and ReLU. Backward: ReLU's gradient, and the sum of gradients of a result used twice.

A program handles `BLOCK` neighbouring elements of memory, in any dense layout that the tensors share.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.common.launch import cdiv
from conddetr.kernels.common.triton import load_float, own_block, store_cast

SIZES = ("units",)
"""Not specialised (`operators.py` says why)."""
BLOCK = 2048
"""Elements per program: 16 a thread, which is two loads of 16 bytes in half precision."""
UNIT = 8
"""Elements that are masked together. It lets the compiler load 16 bytes at once, although the size is not known to
it."""


@triton.jit
def load_range(units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets [BLOCK] of a program's elements, and the mask of those that exist."""
    offset = own_block(BLOCK)
    return offset, offset < tl.full((), UNIT, tl.int64) * units


@triton.jit(do_not_specialize=SIZES)
def epilogue_kernel(
    out, shift, addend, units,
    HAS_SHIFT: tl.constexpr, HAS_ADDEND: tl.constexpr,
    CHANNELS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = max(out + shift[channel] + addend, 0), in place; channels are the innermost dimension."""
    offset, mask = load_range(units, UNIT, BLOCK)
    x = load_float(out + offset, mask)
    if HAS_SHIFT:
        x += load_float(shift + offset % CHANNELS, mask)
    if HAS_ADDEND:
        x += load_float(addend + offset, mask)
    # Not `maximum`, which would lose a NaN.
    store_cast(out + offset, tl.where(x < 0, 0.0, x), mask)


@triton.jit(do_not_specialize=SIZES)
def relu_backward_kernel(
    grad, other_grad, y, masked, units,
    HAS_OTHER: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """masked = grad + other_grad where y > 0, else 0."""
    offset, mask = load_range(units, UNIT, BLOCK)
    total = load_float(grad + offset, mask)
    if HAS_OTHER:
        total += load_float(other_grad + offset, mask)
    # As in PyTorch: where y is NaN the gradient passes.
    is_zero = load_float(y + offset, mask) <= 0
    store_cast(masked + offset, tl.where(is_zero, 0.0, total), mask)


def launch(count: int) -> tuple[tuple[int], int, dict[str, int]]:
    """The grid, the number of units, and the sizes for a number of elements."""
    unit = UNIT if count % UNIT == 0 else 1
    return (cdiv(count, BLOCK),), count // unit, {"UNIT": unit, "BLOCK": BLOCK}


def epilogue_(out: Tensor, shift: Tensor | None, addend: Tensor | None) -> None:
    """ReLU of [B, C, h, w] in channels-last plus [C] plus a map of the same layout, in place."""
    grid, units, sizes = launch(out.numel())
    flags = {"HAS_SHIFT": shift is not None, "HAS_ADDEND": addend is not None}
    epilogue_kernel[grid](out, shift, addend, units, **flags, CHANNELS=out.shape[1], **sizes)


def relu_backward(grad: Tensor, other_grad: Tensor | None, y: Tensor) -> Tensor:
    """The gradient before ReLU, from its result y and one or two gradients of y. All share one dense layout."""
    masked = torch.empty_like(y)
    grid, units, sizes = launch(y.numel())
    has_other = other_grad is not None
    relu_backward_kernel[grid](grad, other_grad, y, masked, units, HAS_OTHER=has_other, **sizes)
    return masked
