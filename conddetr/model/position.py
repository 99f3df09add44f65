"""Two-dimensional sine position encoding of the feature map.

Source: DETR, appendix A.4; `models/position_encoding.py` (`PositionEmbeddingSine`) of the official code.
"""

import math

import torch
from torch import Tensor

from conddetr.kernels.sine import frequencies, interleave_sin_cos


def sine_position_encoding(padding: Tensor, dim: int, temperature: float = 10000.0, normalize: bool = True) -> Tensor:
    """Position encoding of every cell, counted over the valid cells of its row and column.

    Args:
        padding: [B, h, w] bool, True = padding.
        dim: channels, a multiple of 4.
        temperature: base of the geometric series of wavelengths.
        normalize: scale coordinates to (0, 2π] by the valid height and width.

    Returns:
        [B, h·w, dim] float32 (the official code computes it in float32 whatever the model's dtype): y's half
        first, then x's.
    """
    valid = (~padding).to(torch.float32)
    y, x = valid.cumsum(1), valid.cumsum(2)
    if normalize:
        y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
        x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    divisors = frequencies(dim // 2, temperature, padding.device)
    return torch.cat([interleave_sin_cos(axis.unsqueeze(-1) / divisors) for axis in (y, x)], dim=-1).flatten(1, 2)
