"""Shared code of Triton's kernels: a program's elements, tiles of rows, dropout, partial sums, products."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SEED = ("seed_pointer",)
"""Its alignment is not specialised: a seed may be any element of the seeds of a step."""


@triton.jit
def load_float(pointers, mask):
    """Values of any dtype as float32; zeros where masked."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_cast(pointers, value, mask):
    """Stores values in the dtype of the memory."""
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def own_block(BLOCK: tl.constexpr):
    """[BLOCK] indices of a program's elements, or rows, on the first axis of the grid; 64 bits wide."""
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def tile(row, is_row, column, is_column, width):
    """Offsets [rows, columns] in memory with rows of `width` numbers, and the mask of those that exist."""
    return row[:, None] * width + column[None, :], is_row[:, None] & is_column[None, :]


@triton.jit
def keep_mask(seed, row, first, channels, dropout_p, WIDTH: tl.constexpr):
    """[rows, WIDTH] bool: which elements of the channels first … first + WIDTH dropout keeps.

    Philox at (seed, row, channel // 4) and lane channel % 4 decides, so the result does not depend on the tiles.
    """
    groups = (channels + 3) // 4
    group = first // 4 + tl.arange(0, WIDTH // 4)
    counter = row[:, None].to(tl.int64) * groups + group[None, :]
    a, b, c, d = tl.randint4x(seed, counter)
    lanes = tl.join(tl.join(a, c), tl.join(b, d))
    lanes = tl.reshape(lanes, (row.shape[0], WIDTH))
    # The upper 24 bits as a number in [0, 1): exact in float32.
    uniform = ((lanes.to(tl.uint32, bitcast=True)) >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return uniform >= dropout_p


@triton.jit
def dropped(value, seed, row, first, channels, dropout_p):
    """[rows, WIDTH] after dropout; arguments as in `keep_mask`."""
    kept = keep_mask(seed, row, first, channels, dropout_p, value.shape[1])
    return tl.where(kept, value * (1.0 / (1.0 - dropout_p)), 0.0)


@triton.jit
def vector(pointer, column, is_column):
    """[1, columns] float32, one value per channel; zeros past the last channel."""
    return load_float(pointer + column, is_column)[None, :]


@triton.jit
def store_partial(partials, replicas, column, is_column, value, CHANNELS: tl.constexpr):
    """Stores this program's row of partial sums [replicas, CHANNELS], and zeros in its share of the unused rows."""
    tl.store(partials + tl.program_id(0) * CHANNELS + column, value, mask=is_column)
    for unused in range(tl.program_id(0) + tl.num_programs(0), replicas, tl.num_programs(0)):
        tl.store(partials + unused * CHANNELS + column, tl.zeros_like(value), mask=is_column)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b, summed in float32. `emulate`: Triton's interpreter cannot multiply bfloat16."""
    if PRECISION == "emulate":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


def precision(tensor: Tensor) -> str:
    """How products of float32 are formed; PyTorch's own switch selects TF32."""
    if tensor.device.type == "cpu":
        return "emulate"
    # PyTorch has several switches for TF32; this one reads correctly whichever of them was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
