"""Encoder layers from fused operations: 9 launches per layer in the forward pass."""

from collections.abc import Callable, Iterator
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
    repeatable,
)
from conddetr.model.recompute import recomputed

_CLASSES = frozenset((EncoderLayer, EncoderSelfAttention))


class LayerWeights(NamedTuple):
    """Weights of one encoder layer."""

    query_key: tuple[Made, Made]
    value: tuple[Made, Made]
    attention: Branch
    feed_forward: FeedForwardWeights


class Settings(NamedTuple):
    """Settings of an encoder or decoder layer in its current mode, training or evaluation."""

    heads: int
    attention_dropout: float
    inner_dropout: Dropout
    """Behind ReLU."""
    dropout: Dropout
    """At the end of each branch."""


class Tokens(NamedTuple):
    """The tokens between two layers, in the three versions that operations need."""

    trunk: Tensor
    """[B, N, C] float32 (or wider): the residual stream."""
    out: Tensor
    """[B, N, C] in the step's dtype."""
    positioned: Tensor
    """[B, N, C] in the step's dtype, with the positions added."""


def recipes(encoder: Encoder, tokens: int | None) -> list[LayerWeights | None]:
    """Recipes of each layer; None for layers that have to be called. `tokens`: number in all images, if known."""
    return [_recipes(layer, tokens) if parts.misfit(layer, _CLASSES) is None else None for layer in encoder.layers]


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
    """Run the encoder.

    Args:
        encoder: layers without weights are called as modules.
        weights: of its layers.
        tokens: [B, N, C] in the step's dtype.
        padding: [B, N] bool, True = padding; None: no padding.
        position: [B or 1, N, C] in the step's dtype.
        seeds: of dropout.

    Returns:
        Memory [B, N, C] in the step's dtype.
    """
    mask = None if padding is None else attention_mask(padding, tokens.dtype)
    stream = begin(tokens, position)
    last = len(weights) - 1
    for index, (layer, layer_weights) in enumerate(zip(encoder.layers, weights, strict=True)):
        paths.note("encoder layer", "modules" if layer_weights is None else "fused operations")
        if layer_weights is None:
            inputs = (for_a_module(stream.trunk, stream.out), padding, position)
            stream = begin(recomputed(encoder, "encoder layer", layer, *inputs), position)
            continue
        unit = _unit(layer, layer_weights, mask, position if index < last else None, seeds)
        stream = recomputed(encoder, "encoder layer", unit, *stream)
    return stream.out


def _unit(
    layer: EncoderLayer, weights: LayerWeights, mask: Tensor | None, position: Tensor | None, seeds: Iterator[Tensor]
) -> Callable[..., Tokens]:
    """A layer as a function of the fields of `Tokens`; it drops the same values in every call."""
    layer_seeds = repeatable(seeds)
    return lambda *stream: run_layer(weights, _settings(layer, layer_seeds()), Tokens(*stream), mask, position)


def _settings(layer: EncoderLayer, seeds: Iterator[Tensor]) -> Settings:
    attention = layer.self_attn
    dropout = Dropout(layer.dropout if layer.training else 0.0, seeds)
    return Settings(attention.num_heads, attention.dropout if attention.training else 0.0, dropout, dropout)


def begin(tokens: Tensor, position: Tensor) -> Tokens:
    """Tokens from a module's output; `position` has the step's dtype."""
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
    """Run a layer. Without a position it is the last layer, which returns a single tensor.

    Args:
        mask: from `attention_mask`.
        wants_trunk: the last layer returns the trunk, not the tokens in the step's dtype.
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
    """PyTorch's fused attention for projected tokens [B, N, C]."""
    paths.note("self-attention", "PyTorch's scaled_dot_product_attention")
    heads = (x.unflatten(-1, (settings.heads, -1)).transpose(1, 2) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=settings.attention_dropout)
    return attended.transpose(1, 2).flatten(-2)


def attention_mask(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask of fused attention, [B, 1, 1, N], made once for all layers.

    All strides but the last are multiples of 16 elements: otherwise PyTorch would copy the mask in every call.
    """
    batch, keys = padding.shape
    mask = torch.zeros(batch, 1, 1, (keys + 15) // 16 * 16, dtype=dtype, device=padding.device)[..., :keys]
    return mask.masked_fill_(padding[:, None, None], float("-inf"))
