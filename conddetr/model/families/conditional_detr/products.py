"""The two products of Conditional DETR's cross-attention, for pictures.

They are spatial p_q·p_k and content c_q·c_k, as concatenated. In the first layer positions are added to the content as
well: (c_q + o_q)·(c_k + p_k), o_q being the projected object query.
"""

from typing import Any

from torch import Tensor

from conddetr.kernels.attn import dense_spatial_keys
from conddetr.model.families.conditional_detr.attention import ConditionalCrossAttention, Keys
from conddetr.model.families.conditional_detr.decoder import ConditionalDecoderLayer
from conddetr.model.families.products import Products


def cross_attention(layer: ConditionalDecoderLayer) -> ConditionalCrossAttention:
    """The module whose inputs `products` reads."""
    return layer.cross_attn


def products(layer: ConditionalDecoderLayer, q_content: Tensor, q_spatial: Tensor, keys: Keys, *_: Any) -> Products:
    """The halves that the official code concatenates, from the inputs of the layer's cross-attention."""
    k_spatial = dense_spatial_keys(*keys.spatial) if isinstance(keys.spatial, tuple) else keys.spatial
    # Heads are of content and position side by side.
    scale = (2 * q_content.shape[-1] // layer.cross_attn.num_heads) ** -0.5
    if layer.is_first:
        # Here arrive q and q + q_s, of which the layer makes q·k + (q + q_s)·k_p. The official halves of the same sum
        # are q·(k + k_p) and q_s·k_p.
        formulas = (r"$p_q^\top p_k$", r"$(c_q + o_q)^\top (c_k + p_k)$")
        return Products(q_spatial - q_content, k_spatial, q_content, keys.content + k_spatial, formulas, scale)
    return Products(q_spatial, k_spatial, q_content, keys.content, (r"$p_q^\top p_k$", r"$c_q^\top c_k$"), scale)
