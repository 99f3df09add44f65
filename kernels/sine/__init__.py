"""Sinusoidal embedding of points, and the conditional spatial query made from it."""

from conddetr.kernels.sine.reference import (
    conditional_spatial_query,
    frequencies,
    interleave_sin_cos,
    sine_embedding,
)

__all__ = ["conditional_spatial_query", "frequencies", "interleave_sin_cos", "sine_embedding"]
