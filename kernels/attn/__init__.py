"""Conditional cross-attention."""

from conddetr.kernels.attn.reference import attention_weights, conditional_attention

__all__ = ["attention_weights", "conditional_attention"]
