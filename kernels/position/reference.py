"""Valid cells of a grid and their sine encoding in plain PyTorch: the reference for the kernel.

Source: DETR, appendix A.4; `models/position_encoding.py` (`PositionEmbeddingSine`) of the official code.
"""

import math

import torch
from torch import Tensor

from conddetr.kernels.attn.reference import rectangle_padding
from conddetr.kernels.sine.reference import frequencies, interleave_sin_cos


def valid_cells(valid_hw: Tensor, image_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Valid height and width in cells of a batch padded at the bottom and right.

    Args:
        valid_hw: [B, 2] integer, valid height and width in pixels of a batch padded to `image_size`.
        image_size: H and W in pixels.
        grid: h and w of the feature map.

    Returns:
        [B, 2] int32, valid height and width in cells: those whose pixel, by nearest neighbour, is valid.
    """
    counts = []
    for axis, (pixels, cells) in enumerate(zip(image_size, grid, strict=True)):
        # In float32, as `interpolate` computes the pixel of a cell.
        pixel = (torch.arange(cells, dtype=torch.float32, device=valid_hw.device) * (pixels / cells)).floor()
        counts.append((pixel < valid_hw[:, axis, None]).sum(1))
    return torch.stack(counts, dim=1).to(torch.int32)


def sine_position_encoding(padding: Tensor, dim: int, temperature: float = 10000.0, normalize: bool = True) -> Tensor:
    """Position encoding of every cell, counted over the valid cells of its row and column.

    Args:
        padding: [B, h, w] bool, True = padding.
        dim: channels, a multiple of 4.
        temperature: base of the geometric series of wavelengths.
        normalize: scale coordinates to (0, 2π] by the valid height and width.

    Returns:
        [B, h·w, dim] float32 (the official code computes it in float32 for every model dtype): y's half
        first, then x's.
    """
    valid = (~padding).to(torch.float32)
    y, x = valid.cumsum(1), valid.cumsum(2)
    if normalize:
        y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
        x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    divisors = frequencies(dim // 2, temperature, padding.device)
    return torch.cat([interleave_sin_cos(axis.unsqueeze(-1) / divisors) for axis in (y, x)], dim=-1).flatten(1, 2)


def grid_positions(
    valid_hw: Tensor | None, image_size: tuple[int, int], size: tuple[int, int], dim: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Float32 positions, padding and valid cells; see `op.py`."""
    if valid_hw is None:
        no_padding = torch.zeros((1, *size), dtype=torch.bool, device=device)
        return sine_position_encoding(no_padding, dim), None, None
    cells = valid_cells(valid_hw, image_size, size)
    padding = rectangle_padding(cells, *size)
    return sine_position_encoding(padding.unflatten(1, size), dim), padding, cells
