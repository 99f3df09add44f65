"""Sinusoidal embeddings in plain PyTorch: the reference for every kernel.

Source: Conditional DETR, section 3.3 and equation 5; `gen_sineembed_for_position` of the official
implementation (which fixes dim = 256).
"""

import math

import torch
from torch import Tensor


def frequencies(count: int, temperature: float = 10000.0, device: torch.device | None = None) -> Tensor:
    """Divisors of the phases, pairwise equal: temperature ** (2⌊i/2⌋ / count).

    Always float32, even in a float64 model, as in the official implementation.

    Returns:
        [count] float32.
    """
    index = torch.arange(count, dtype=torch.float32, device=device)
    return temperature ** (2 * (index // 2) / count)


def interleave_sin_cos(phase: Tensor) -> Tensor:
    """[..., n] phases in radians -> [..., n]: sine of the even channels, cosine of the odd ones."""
    return torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), dim=-1).flatten(-2)


def sine_embedding(points: Tensor, dim: int, temperature: float) -> Tensor:
    """[..., 2] points as (x, y) -> [..., dim] of the same dtype; checks are in `op.py`."""
    phase = points.unsqueeze(-1) * (2 * math.pi) / frequencies(dim // 2, temperature, points.device)
    return interleave_sin_cos(phase).flip(-2).flatten(-2).to(points.dtype)


def conditional_spatial_query(points: Tensor, transform: Tensor, temperature: float) -> Tensor:
    """λ ⊙ p_s: points [..., 2] and transform [..., dim], broadcast against each other -> [..., dim]."""
    return transform * sine_embedding(points, transform.shape[-1], temperature)
