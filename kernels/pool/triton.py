"""The largest value of windows of 3×3 cells in channels-last, stride 2, without its index.

A program handles neighbouring elements of one row of the result, so its loads are adjacent too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.common.launch import cdiv
from conddetr.kernels.common.triton import store_cast

SIZES = ("height", "width", "out_height", "out_width")
"""Not specialised (`operators.py` says why)."""
BLOCK = 1024
"""Elements per program: 8 a thread, one load of 16 bytes in half precision for each cell of the window."""


@triton.jit(do_not_specialize=SIZES)
def max_pool_kernel(x, y, height, width, out_height, out_width, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """y [B, out_height, out_width, CHANNELS] of x [B, height, width, CHANNELS]."""
    index = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, left = element % CHANNELS, 2 * (element // CHANNELS) - 1
    top = 2 * (index % out_height) - 1
    first = index // out_height * height
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for window in tl.static_range(9):
        row, column = top + window // 3, left + window % 3
        # Beyond the edges a row has no elements.
        end = tl.where((row >= 0) & (row < height), out_width * CHANNELS, 0)
        is_cell = (element < end) & (column >= 0) & (column < width)
        pointers = x + (first + row) * width * CHANNELS + column * CHANNELS + channel
        value = tl.load(pointers, mask=is_cell, other=float("-inf")).to(tl.float32)
        # Not `maximum`, which would lose a NaN.
        largest = tl.where((value > largest) | (value != value), value, largest)
    store_cast(y + index * out_width * CHANNELS + element, largest, element < out_width * CHANNELS)


def max_pool(x: Tensor) -> Tensor:
    """[B, C, H, W] in channels-last -> [B, C, ⌈H/2⌉, ⌈W/2⌉], likewise."""
    batch, channels, height, width = x.shape
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    shape = (batch, channels, out_height, out_width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    grid = (batch * out_height, cdiv(out_width * channels, BLOCK))
    max_pool_kernel[grid](x, y, height, width, out_height, out_width, CHANNELS=channels, BLOCK=BLOCK)
    return y
