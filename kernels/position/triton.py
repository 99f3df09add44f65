"""Sine position encoding, padding and valid cells of a grid in one launch.

A program handles a block of cells of one image and all channels. It counts the valid rows and columns itself, because
they are few. Angles are in turns, as in the sine embedding.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.common.launch import cdiv, next_power_of_2
from conddetr.kernels.common.triton import store_cast, tile
from conddetr.kernels.sine.triton import channels, sin_turns, turns_of

SIZES = ("height", "width")
"""Not specialised (`operators.py` says why)."""
BLOCK_ELEMENTS = 4096
"""Elements per program: enough stores in flight for bandwidth, few enough registers not to spill."""


@triton.jit
def count_valid(valid, cells, scale, CELLS: tl.constexpr):
    """How many cells of an axis have a valid pixel, by nearest neighbour, in float32 as PyTorch computes it."""
    cell = tl.arange(0, CELLS)
    pixel = tl.floor(cell.to(tl.float32) * scale)
    return tl.sum(((pixel < valid.to(tl.float32)) & (cell < cells)).to(tl.int32), axis=0)


@triton.jit
def share_of(counted, total):
    """Cell numbers, from 1, as a fraction of the total; 0 if nothing was counted."""
    return counted.to(tl.float32) / (total.to(tl.float32) + 1e-6)


@triton.jit(do_not_specialize=SIZES)
def position_kernel(
    valid_hw, position, is_padding, valid_cells, height, width, scale_y, scale_x, log2_temperature,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """position [B, h·w, DIM], is_padding [B, h·w], valid_cells [B, 2]; the last two only with `valid_hw`."""
    image = tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < height * width
    row, column = cell // width, cell % width
    valid_height, valid_width = height, width
    if HAS_VALID:
        valid_height = count_valid(tl.load(valid_hw + 2 * image), height, scale_y, CELLS)
        valid_width = count_valid(tl.load(valid_hw + 2 * image + 1), width, scale_x, CELLS)
        is_valid = (row < valid_height) & (column < valid_width)
        tl.store(is_padding + image * height * width + cell, is_valid == 0, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(valid_cells + 2 * image, valid_height)
            tl.store(valid_cells + 2 * image + 1, valid_width)
    # Rows are counted in the cell's column, which has none if it is padding from top to bottom; columns likewise.
    y = tl.where(column < valid_width, share_of(tl.minimum(row + 1, valid_height), valid_height), 0.0)
    x = tl.where(row < valid_height, share_of(tl.minimum(column + 1, valid_width), valid_width), 0.0)
    channel, rate, shift, is_y = channels(DIM, PADDED, log2_temperature)
    value = sin_turns(turns_of(x, y, rate, shift, is_y))
    offset, mask = tile(image * height * width + cell, inside, channel, channel < DIM, DIM)
    store_cast(position + offset, value, mask)


def launch(dim: int, cells: int) -> dict[str, int]:
    """Block sizes for a number of channels, and of rows or columns."""
    padded = next_power_of_2(dim)
    block = max(1, BLOCK_ELEMENTS // padded)
    return {"DIM": dim, "PADDED": padded, "BLOCK": block, "CELLS": max(64, next_power_of_2(cells))}


def forward(
    features: Tensor,
    valid_hw: Tensor | None,
    image_height: int,
    image_width: int,
    dim: int,
    temperature: float = 10000.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As in `op.py`; padding and valid cells are empty if nothing is padded."""
    batch, _, height, width = features.shape
    images, padded = (1, 0) if valid_hw is None else (batch, batch)
    position = features.new_empty((images, height * width, dim))
    padding = features.new_empty((padded, height * width), dtype=torch.bool)
    cells = features.new_empty((padded, 2), dtype=torch.int32)
    sizes = launch(dim, max(height, width))
    scales = (image_height / height, image_width / width)
    position_kernel[(cdiv(height * width, sizes["BLOCK"]), images)](
        valid_hw, position, padding, cells, height, width, *scales, math.log2(temperature), **sizes,
        HAS_VALID=valid_hw is not None,
    )  # fmt: skip
    return position, padding, cells
