"""The operations of Conditional DETR, one folder each. This package knows nothing of detection."""

from conddetr.kernels.attn import conditional_attention
from conddetr.kernels.sine import conditional_spatial_query, sine_embedding

__all__ = ["conditional_attention", "conditional_spatial_query", "sine_embedding"]
