"""Conditional cross-attention."""

from conddetr.kernels.attn.op import conditional_attention
from conddetr.kernels.attn.reference import attention_weights, dense_spatial_keys, rectangle_padding

__all__ = ["attention_weights", "conditional_attention", "dense_spatial_keys", "rectangle_padding"]
