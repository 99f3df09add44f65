"""Bias, dropout, residual sum and layer norm in one pass over memory, and all their gradients in another.

A program handles a block of whole rows. Forward saves the normalised rows and one number per row. Backward needs
neither the sum nor its terms, and recomputes the dropout mask (`keep_mask`).

Backward has a fixed number of programs. Each loops over rows and sums its share of the gradients of weight and bias
into one row of partial sums, in a fixed order. All arithmetic is float32.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.add_norm.op import MAX_GRADIENTS
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

SIZES = ("rows", "position_rows")
"""Not specialised (`operators.py` says why)."""
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 1024, 2048
"""Per program and iteration, for 128 threads. Backward has few programs, so each must have more loads in flight."""


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SEED)
def add_norm_kernel(
    branch, residual, weight, bias, branch_bias, position, seed_pointer, trunk, out, placed, normalized, rstd,
    dropout_p, eps, rows, position_rows,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_TRUNK: tl.constexpr, HAS_OUT: tl.constexpr,
    SAVES: tl.constexpr,
):  # fmt: skip
    """trunk, out: the norm in two dtypes; placed: with the position added; normalized, rstd: for backward."""
    row = own_block(BLOCK)
    column = tl.arange(0, PADDED)
    inside, is_column = row < rows, column < CHANNELS
    offset, mask = tile(row, inside, column, is_column, CHANNELS)
    added = load_float(branch + offset, mask)
    if HAS_BIAS:
        added += vector(branch_bias, column, is_column)
    if HAS_DROPOUT:
        added = dropped(added, tl.load(seed_pointer), row, 0, CHANNELS, dropout_p)
    z = load_float(residual + offset, mask) + added
    mean = tl.sum(z, axis=1) / CHANNELS
    centered = tl.where(is_column[None, :], z - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, axis=1) / CHANNELS + eps)
    hat = centered * scale[:, None]
    y = hat * vector(weight, column, is_column) + vector(bias, column, is_column)
    if SAVES:
        store_cast(normalized + offset, hat, mask)
        tl.store(rstd + row, scale, mask=inside)
    if HAS_TRUNK:
        store_cast(trunk + offset, y, mask)
    if HAS_OUT:
        store_cast(out + offset, y, mask)
    if HAS_POSITION:
        where = (row % position_rows)[:, None] * CHANNELS + column[None, :]
        y += load_float(position + where, mask)
        store_cast(placed + offset, y, mask)


@triton.jit(do_not_specialize=(*SIZES, "replicas"), do_not_specialize_on_alignment=SEED)
def add_norm_backward_kernel(
    grad_0, grad_1, grad_2, grad_3, normalized, rstd, weight, seed_pointer, grad_branch, grad_residual, partials,
    dropout_p, rows, replicas,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, GRADIENTS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_RESIDUAL: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """partials [VECTORS, replicas, CHANNELS] float32: weight, bias and branch_bias (3), the first two (2) or none."""
    column = tl.arange(0, PADDED)
    is_column = column < CHANNELS
    scales = vector(weight, column, is_column)
    seed = tl.load(seed_pointer) if HAS_DROPOUT else 0
    of_weight = tl.zeros((BLOCK, PADDED), tl.float32)
    of_bias = tl.zeros((BLOCK, PADDED), tl.float32)
    of_branch_bias = tl.zeros((BLOCK, PADDED), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = row < rows
        offset, mask = tile(row, inside, column, is_column, CHANNELS)
        hat = load_float(normalized + offset, mask)
        upstream = load_float(grad_0 + offset, mask)
        if GRADIENTS > 1:
            upstream += load_float(grad_1 + offset, mask)
        if GRADIENTS > 2:
            upstream += load_float(grad_2 + offset, mask)
        if GRADIENTS > 3:
            upstream += load_float(grad_3 + offset, mask)
        slope = upstream * scales
        along = tl.sum(slope * hat, axis=1) / CHANNELS
        mean = tl.sum(slope, axis=1) / CHANNELS
        of_z = slope - hat * along[:, None] - mean[:, None]
        # Zero past the last row.
        of_z *= tl.load(rstd + row, mask=inside, other=0.0)[:, None]
        if HAS_RESIDUAL:
            store_cast(grad_residual + offset, of_z, mask)
        if HAS_DROPOUT:
            of_z = dropped(of_z, seed, row, 0, CHANNELS, dropout_p)
        if HAS_BRANCH:
            store_cast(grad_branch + offset, of_z, mask)
        of_weight += upstream * hat
        of_bias += upstream
        of_branch_bias += of_z
    if VECTORS > 0:
        store_partial(partials, replicas, column, is_column, tl.sum(of_weight, axis=0), CHANNELS)
        partials += replicas * CHANNELS
        store_partial(partials, replicas, column, is_column, tl.sum(of_bias, axis=0), CHANNELS)
    if VECTORS > 2:
        partials += replicas * CHANNELS
        store_partial(partials, replicas, column, is_column, tl.sum(of_branch_bias, axis=0), CHANNELS)


@functools.cache
def launch(channels: int, elements: int) -> dict[str, int | bool]:
    """Block sizes and compiler options for a number of channels, and of elements per program and iteration."""
    padded = max(16, next_power_of_2(channels))
    sizes = {"CHANNELS": channels, "PADDED": padded, "BLOCK": max(1, elements // padded)}
    return {**sizes, "num_warps": 4, "enable_fp_fusion": True}


def forward(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    position: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    has_trunk: bool,
    has_out: bool,
    saves: bool,
) -> tuple[Tensor, ...]:
    """trunk, out, placed, normalized [..., C] and rstd [rows]; those not requested are empty. All inputs are
    contiguous; of vectors [P, C] the first row is read.
    """
    dtype = torch.promote_types(branch.dtype, residual.dtype)
    trunk, out, placed, normalized = (
        torch.empty_like(branch, dtype=map_dtype) if wanted else branch.new_empty(0, dtype=map_dtype)
        for wanted, map_dtype in (
            (has_trunk, dtype), (has_out, branch.dtype), (position is not None, branch.dtype), (saves, dtype)
        )
    )  # fmt: skip
    channels = branch.shape[-1]
    rows = branch.numel() // channels
    rstd = branch.new_empty(rows if saves else 0, dtype=torch.float32)
    sizes = launch(channels, FORWARD_ELEMENTS)
    if rows:
        add_norm_kernel[(cdiv(rows, sizes["BLOCK"]),)](
            branch, residual, weight, bias, branch_bias, position, seed, trunk, out, placed, normalized, rstd,
            dropout_p, eps, rows, 1 if position is None else position.numel() // channels,
            HAS_BIAS=branch_bias is not None, HAS_POSITION=position is not None, HAS_DROPOUT=dropout_p > 0,
            HAS_TRUNK=has_trunk, HAS_OUT=has_out, SAVES=saves, **sizes,
        )  # fmt: skip
    return trunk, out, placed, normalized, rstd


def backward(
    gradients: list[Tensor],
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    branch: torch.dtype | None,
    residual: torch.dtype | None,
    vectors: int,
    replicas: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of branch and residual in these dtypes, empty for None, and partials [vectors, replicas, C] float32.

    `gradients` are those of one to `MAX_GRADIENTS` outputs. All tensors are contiguous.
    """
    grad_branch, grad_residual = (
        normalized.new_empty(0) if dtype is None else torch.empty_like(normalized, dtype=dtype)
        for dtype in (branch, residual)
    )
    channels, rows = normalized.shape[-1], rstd.numel()
    partials = normalized.new_empty((vectors, replicas, channels), dtype=torch.float32)
    sizes = launch(channels, BACKWARD_ELEMENTS)
    programs = max(1, min(replicas, cdiv(rows, sizes["BLOCK"])))
    add_norm_backward_kernel[(programs,)](
        *gradients, *[None] * (MAX_GRADIENTS - len(gradients)), normalized, rstd, weight, seed,
        grad_branch, grad_residual, partials, dropout_p, rows, replicas,
        GRADIENTS=len(gradients), HAS_DROPOUT=dropout_p > 0, HAS_BRANCH=branch is not None,
        HAS_RESIDUAL=residual is not None, VECTORS=vectors, **sizes,
    )  # fmt: skip
    return grad_branch, grad_residual, partials
