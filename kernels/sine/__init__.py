"""Sinusoidal embedding of points, and the conditional spatial query made from it."""

from conddetr.kernels.sine.op import conditional_spatial_query, sine_embedding
from conddetr.kernels.sine.reference import frequencies, interleave_sin_cos

__all__ = ["conditional_spatial_query", "frequencies", "interleave_sin_cos", "sine_embedding"]
