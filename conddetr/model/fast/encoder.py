"""Encoder layers: 9 launches forward each."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.kernels import paths
from conddetr.kernels.weights import Weight
from conddetr.model.fast import parts
from conddetr.model.fast.layers import (
    Branch,
    Dropout,
    FeedForwardWeights,
    Made,
    branch_weights,
    end_branch,
    feed_forward,
    feed_forward_weights,
    for_a_module,
)
from conddetr.model.transformer import Encoder, EncoderLayer, EncoderSelfAttention

_KINDS = frozenset((EncoderLayer, EncoderSelfAttention))


class LayerWeights(NamedTuple):
    """Of one encoder layer."""

    query_key: tuple[Made, Made]
    value: tuple[Made, Made]
    attention: Branch
    feed_forward: FeedForwardWeights


class Tokens(NamedTuple):
    """The tokens between two layers; the same values, each for those who need them so."""

    trunk: Tensor
    """[B, N, C] float32 (or wider): the residual stream."""
    out: Tensor
    """[B, N, C] in the step's dtype."""
    positioned: Tensor
    """[B, N, C] in the step's dtype, with the positions added."""


def recipes(encoder: Encoder) -> list[LayerWeights | None]:
    """Of each layer; None for one that has to be called as a module."""
    return [_recipes(layer) if parts.misfit(layer, _KINDS) is None else None for layer in encoder.layers]


def _recipes(layer: EncoderLayer) -> LayerWeights:
    attention = layer.self_attn
    width = attention.embed_dim
    query_key, value = (
        tuple(Weight((x,), rows=rows) for x in (attention.in_proj_weight, attention.in_proj_bias))
        for rows in ((0, 2 * width), (2 * width, 3 * width))
    )
    return LayerWeights(
        query_key,
        value,
        branch_weights(attention.out_proj, layer.norm1),
        feed_forward_weights(layer, layer.norm2),
    )


def encode(
    encoder: Encoder,
    weights: list[LayerWeights | None],
    tokens: Tensor,
    padding: Tensor | None,
    position: Tensor,
    seeds: Iterator[Tensor],
) -> Tensor:
    """The encoder.

    Args:
        encoder: whose layers are called where there are no weights.
        weights: of its layers.
        tokens: [B, N, C] in the step's dtype.
        padding: [B, N] bool, True = padding; None: nothing is.
        position: likewise, [B or 1, N, C].
        seeds: of dropout.

    Returns:
        Memory [B, N, C] in the step's dtype.
    """
    hidden = None if padding is None else attention_mask(padding, tokens.dtype)
    stream = _tokens(tokens, position)
    last = len(weights) - 1
    for index, (layer, own) in enumerate(zip(encoder.layers, weights, strict=True)):
        paths.note("encoder layer", "modules" if own is None else "fused operations")
        if own is not None:
            stream = _layer(layer, own, stream, hidden, position if index < last else None, seeds)
            continue
        stream = _tokens(layer(for_a_module(stream.trunk, stream.out), padding, position), position)
    return stream.out


def _tokens(tokens: Tensor, position: Tensor) -> Tokens:
    """Of a module's output; `position` has the step's dtype."""
    out = tokens.to(position.dtype)
    return Tokens(tokens.to(torch.promote_types(out.dtype, torch.float32)), out, out + position)


def _layer(
    layer: EncoderLayer,
    weights: LayerWeights,
    tokens: Tokens,
    mask: Tensor | None,
    position: Tensor | None,
    seeds: Iterator[Tensor],
) -> Tokens:
    """A layer; without a position it is the last, of which only one form of the tokens is wanted."""
    query, key = F.linear(tokens.positioned, *weights.query_key).chunk(2, dim=-1)
    value = F.linear(tokens.out, *weights.value)
    attended = self_attention(query, key, value, layer.self_attn, mask)
    dropout = Dropout(layer.dropout if layer.training else 0.0, seeds)
    trunk, out = end_branch(attended, tokens.trunk, weights.attention, dropout)
    if position is None:
        [out] = feed_forward(out, trunk, weights.feed_forward, dropout, trunks=0)
        return Tokens(out, out, out)
    return Tokens(*feed_forward(out, trunk, weights.feed_forward, dropout, position))


def self_attention(query: Tensor, key: Tensor, value: Tensor, module: nn.Module, mask: Tensor | None) -> Tensor:
    """PyTorch's fused attention of projected tokens [B, N, C]; `module` says how many heads and how much dropout."""
    paths.note("self-attention", "PyTorch's scaled_dot_product_attention")
    heads = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    dropout_p = module.dropout if module.training else 0.0
    attended = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout_p)
    return attended.transpose(1, 2).flatten(-2)


def attention_mask(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """What fused attention adds to its scores, [B, 1, 1, N], made once for all layers.

    Rows begin at multiples of 16 elements: PyTorch would copy others in every call.
    """
    batch, keys = padding.shape
    mask = torch.zeros(batch, (keys + 15) // 16 * 16, dtype=dtype, device=padding.device)[:, :keys]
    return mask.masked_fill_(padding, float("-inf"))[:, None, None, :]
