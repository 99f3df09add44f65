"""Sinusoidal embeddings in plain PyTorch: the truth that every kernel is held to.

Source: Conditional DETR, section 3.3 and equation 5; `gen_sineembed_for_position` of the official
implementation (which fixes dim = 256).
"""

import math

import torch
from torch import Tensor


def frequencies(count: int, temperature: float = 10000.0, device: torch.device | None = None) -> Tensor:
    """Divisors of the phases, pairwise equal: temperature ** (2⌊i/2⌋ / count).

    Always float32, also in a float64 model: so does the official implementation.

    Returns:
        [count] float32.
    """
    index = torch.arange(count, dtype=torch.float32, device=device)
    return temperature ** (2 * (index // 2) / count)


def interleave_sin_cos(phase: Tensor) -> Tensor:
    """[..., n] phases in radians -> [..., n]: sine of the even channels, cosine of the odd ones."""
    return torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), dim=-1).flatten(-2)


def sine_embedding(points: Tensor, dim: int = 256, temperature: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of normalised points.

    Args:
        points: [..., 2] as (x, y) in [0, 1], floating.
        dim: channels of the result, a multiple of 4.
        temperature: base of the geometric series of wavelengths.

    Returns:
        [..., dim]: the half of y first, then that of x; in each, sine and cosine interleaved.

    Raises:
        ValueError: the last dimension is not 2, or `dim` is not a positive multiple of 4.
    """
    if points.shape[-1:] != (2,):
        raise ValueError(f"points: expected shape [..., 2], got {tuple(points.shape)}.")
    if dim < 4 or dim % 4:
        raise ValueError(f"dim: expected a positive multiple of 4, got {dim}.")
    phase = points.unsqueeze(-1) * (2 * math.pi) / frequencies(dim // 2, temperature, points.device)
    return interleave_sin_cos(phase).flip(-2).flatten(-2)


def conditional_spatial_query(points: Tensor, transform: Tensor, temperature: float = 10000.0) -> Tensor:
    """λ ⊙ p_s: the embedding of the reference point, scaled per channel by the predicted transformation.

    Args:
        points: [..., 2] as (x, y) in [0, 1]; its leading dimensions broadcast against those of `transform`.
        transform: [..., dim] λ, dim a multiple of 4.
        temperature: as in `sine_embedding`.

    Returns:
        [..., dim].

    Raises:
        ValueError: as `sine_embedding`.
    """
    return transform * sine_embedding(points, transform.shape[-1], temperature)
