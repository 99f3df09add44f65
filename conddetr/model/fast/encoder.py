"""Encoder layers: 9 launches forward each."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from conddetr.kernels import paths
from conddetr.kernels.weights import Weight
from conddetr.model.encoder import Encoder, EncoderLayer, EncoderSelfAttention
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
    linear,
)

_KINDS = frozenset((EncoderLayer, EncoderSelfAttention))


class LayerWeights(NamedTuple):
    """Of one encoder layer."""

    query_key: tuple[Made, Made]
    value: tuple[Made, Made]
    attention: Branch
    feed_forward: FeedForwardWeights


class Settings(NamedTuple):
    """Of an encoder or decoder layer, in the mode that it is in."""

    heads: int
    attention_dropout: float
    inner_dropout: Dropout
    """Behind ReLU."""
    dropout: Dropout
    """At the end of each branch."""


class Tokens(NamedTuple):
    """The tokens between two layers; the same values, each for those who need them so."""

    trunk: Tensor
    """[B, N, C] float32 (or wider): the residual stream."""
    out: Tensor
    """[B, N, C] in the step's dtype."""
    positioned: Tensor
    """[B, N, C] in the step's dtype, with the positions added."""


def recipes(encoder: Encoder, tokens: int | None) -> list[LayerWeights | None]:
    """Of each layer; None for one that has to be called as a module. `tokens`: of all images, where that is known."""
    return [_recipes(layer, tokens) if parts.misfit(layer, _KINDS) is None else None for layer in encoder.layers]


def _recipes(layer: EncoderLayer, tokens: int | None) -> LayerWeights:
    attention = layer.self_attn
    width, copies = attention.embed_dim, parts.copies(tokens)
    query_key, value = (
        (
            Weight((attention.in_proj_weight,), rows=rows),
            Weight((attention.in_proj_bias,), rows=rows, copies=copies),
        )
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
    mask = None if padding is None else attention_mask(padding, tokens.dtype)
    stream = begin(tokens, position)
    last = len(weights) - 1
    for index, (layer, own) in enumerate(zip(encoder.layers, weights, strict=True)):
        paths.note("encoder layer", "modules" if own is None else "fused operations")
        if own is not None:
            stream = run_layer(own, _settings(layer, seeds), stream, mask, position if index < last else None)
            continue
        stream = begin(layer(for_a_module(stream.trunk, stream.out), padding, position), position)
    return stream.out


def _settings(layer: EncoderLayer, seeds: Iterator[Tensor]) -> Settings:
    attention = layer.self_attn
    dropout = Dropout(layer.dropout if layer.training else 0.0, seeds)
    return Settings(attention.num_heads, attention.dropout if attention.training else 0.0, dropout, dropout)


def begin(tokens: Tensor, position: Tensor) -> Tokens:
    """Of a module's output; `position` has the step's dtype."""
    out = tokens.to(position.dtype)
    return Tokens(tokens.to(torch.promote_types(out.dtype, torch.float32)), out, out + position)


def run_layer(
    weights: LayerWeights,
    settings: Settings,
    tokens: Tokens,
    mask: Tensor | None,
    position: Tensor | None,
    wants_trunk: bool = False,
) -> Tokens:
    """A layer; without a position it is the last, of which one form of the tokens is wanted: the trunk or the other.

    Args:
        mask: as `attention_mask` makes it.
    """
    query, key = linear(tokens.positioned, *weights.query_key).chunk(2, dim=-1)
    value = linear(tokens.out, *weights.value)
    attended = self_attention(query, key, value, settings, mask)
    trunk, out = end_branch(attended, tokens.trunk, weights.attention, settings.dropout)
    options = {"inner_dropout": settings.inner_dropout}
    if position is None:
        options |= {"trunks": int(wants_trunk), "outs": int(not wants_trunk)}
        [out] = feed_forward(out, trunk, weights.feed_forward, settings.dropout, **options)
        return Tokens(out, out, out)
    return Tokens(*feed_forward(out, trunk, weights.feed_forward, settings.dropout, position, **options))


def self_attention(query: Tensor, key: Tensor, value: Tensor, settings: Settings, mask: Tensor | None) -> Tensor:
    """PyTorch's fused attention of projected tokens [B, N, C]."""
    paths.note("self-attention", "PyTorch's scaled_dot_product_attention")
    heads = (x.unflatten(-1, (settings.heads, -1)).transpose(1, 2) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=settings.attention_dropout)
    return attended.transpose(1, 2).flatten(-2)


def attention_mask(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """What fused attention adds to its scores, [B, 1, 1, N], made once for all layers.

    All strides but the last are multiples of 16 elements: PyTorch would copy others in every call.
    """
    batch, keys = padding.shape
    mask = torch.zeros(batch, 1, 1, (keys + 15) // 16 * 16, dtype=dtype, device=padding.device)[..., :keys]
    return mask.masked_fill_(padding[:, None, None], float("-inf"))
