"""ReLU and dropout after a bias in one pass over memory, and the gradients of both in another.

A program handles a block of rows and columns. Backward reads only the result: positive elements were kept. It has a
fixed number of programs for each block of columns. Each loops over rows and sums its share of the gradient of the bias
into one row of partial sums, in a fixed order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.common.launch import cdiv, next_power_of_2
from conddetr.kernels.common.triton import (
    SEED,
    dropped,
    load_float,
    own_block,
    store_cast,
    store_partial,
    tile,
    vector,
)

SIZES = ("rows", "replicas")
"""Not specialised (`operators.py` says why)."""
BLOCK_ELEMENTS = 2048
"""Per program and iteration, for 128 threads."""


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SEED)
def relu_dropout_kernel(
    x, bias, out, seed_pointer, dropout_p, rows,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """out = relu(x + bias), then dropout: each element is zero with probability dropout_p, else scaled; [rows, C]."""
    row = own_block(BLOCK)
    first = tl.program_id(1) * WIDTH
    column = first + tl.arange(0, WIDTH)
    is_column = column < CHANNELS
    offset, mask = tile(row, row < rows, column, is_column, CHANNELS)
    value = load_float(x + offset, mask)
    if HAS_BIAS:
        value += vector(bias, column, is_column)
    # Not `maximum`, which may lose a NaN.
    value = tl.where(value <= 0.0, 0.0, value)
    if HAS_DROPOUT:
        value = dropped(value, tl.load(seed_pointer), row, first, CHANNELS, dropout_p)
    store_cast(out + offset, value, mask)


@triton.jit(do_not_specialize=SIZES)
def relu_dropout_backward_kernel(
    grad, out, grad_x, partial, dropout_p, rows, replicas,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """grad_x [rows, C], and partial [replicas, C] float32: partial sums of the gradient of the bias."""
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_column = column < CHANNELS
    of_bias = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        offset, mask = tile(row, row < rows, column, is_column, CHANNELS)
        slope = load_float(grad + offset, mask) * (1.0 / (1.0 - dropout_p))
        slope = tl.where(tl.load(out + offset, mask=mask, other=0.0) <= 0.0, 0.0, slope)
        store_cast(grad_x + offset, slope, mask)
        of_bias += slope
    if HAS_BIAS:
        store_partial(partial, replicas, column, is_column, tl.sum(of_bias, axis=0), CHANNELS)


@functools.cache
def launch(channels: int) -> dict[str, int | bool]:
    """Block sizes and compiler options for a number of channels."""
    width = min(256, max(16, next_power_of_2(channels)))
    return {
        "CHANNELS": channels,
        "WIDTH": width,
        "BLOCK": BLOCK_ELEMENTS // width,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _sizes(x: Tensor) -> tuple[int, dict[str, int]]:
    """Rows, and the block sizes."""
    channels = max(1, x.shape[-1]) if x.dim() else 1
    return x.numel() // channels, launch(channels)


def forward(x: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Contiguous x [..., C], bias [C] or [P, C], of which the first row is read; seed if dropout_p is not 0."""
    out = torch.empty_like(x)
    rows, sizes = _sizes(x)
    if rows:
        relu_dropout_kernel[(cdiv(rows, sizes["BLOCK"]), cdiv(sizes["CHANNELS"], sizes["WIDTH"]))](
            x, bias, out, seed, dropout_p, rows, HAS_BIAS=bias is not None, HAS_DROPOUT=dropout_p > 0, **sizes
        )
    return out


def backward(grad: Tensor, out: Tensor, dropout_p: float, replicas: int) -> tuple[Tensor, Tensor]:
    """Gradient of x, and partial sums [replicas, C] float32 of that of the bias, which 0 replicas leave out."""
    rows, sizes = _sizes(out)
    grad_x = torch.empty_like(out)
    partial = out.new_empty((replicas, out.shape[-1] if out.dim() else 1), dtype=torch.float32)
    programs = cdiv(rows, sizes["BLOCK"])
    if replicas:
        programs = max(1, min(replicas, programs))
    if programs:
        relu_dropout_backward_kernel[(programs, cdiv(sizes["CHANNELS"], sizes["WIDTH"]))](
            grad, out, grad_x, partial, dropout_p, rows, replicas, HAS_BIAS=replicas > 0, **sizes
        )
    return grad_x, partial
