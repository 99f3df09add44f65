"""The two products of the original DETR's cross-attention, for pictures.

DETR adds positions to the content and projects the sum. The projection is linear, so the scores are the sum of a
spatial product (c_q + o_q)·p_k and a content product (c_q + o_q)·c_k.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.model.families.detr.decoder import DETRDecoderLayer
from conddetr.model.families.products import Products


def cross_attention(layer: DETRDecoderLayer) -> nn.MultiheadAttention:
    """The module whose inputs `products` reads."""
    return layer.multihead_attn


def products(layer: DETRDecoderLayer, query: Tensor, key: Tensor, memory: Tensor) -> Products:
    """Split the scores by the input of the key projection: positions or memory."""
    attention = layer.multihead_attn
    (q_weight, k_weight, _), (q_bias, k_bias, _) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    projected = F.linear(query, q_weight, q_bias)
    formulas = (r"$(c_q + o_q)^\top p_k$", r"$(c_q + o_q)^\top c_k$")
    k_spatial, k_content = F.linear(key - memory, k_weight), F.linear(memory, k_weight, k_bias)
    scale = (query.shape[-1] // attention.num_heads) ** -0.5
    return Products(projected, k_spatial, projected, k_content, formulas, scale)
