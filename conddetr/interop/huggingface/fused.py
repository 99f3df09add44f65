"""Encoder and decoder of transformers 5 from fused operations, as `conddetr.model.fast` computes ours.

Where all parts of one are plain, on a GPU. transformers' arithmetic stays: with auxiliary losses the next decoder layer
goes on from the normalised tokens, spatial keys are dense, and positions and queries may differ from image to image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

from conddetr.interop.huggingface import attention_v5 as structure
from conddetr.kernels import add_norm, conditional_attention, paths, sine_embedding
from conddetr.model.fast import decoder as fast_decoder
from conddetr.model.fast import encoder as fast_encoder
from conddetr.model.fast import parts
from conddetr.model.fast.layers import (
    Dropout,
    FeedForwardWeights,
    Made,
    Pairs,
    branch_weights,
    end_branch,
    feed_forward,
    for_a_module,
    hidden,
    hidden_weights,
    linear,
    seeds,
)
from conddetr.model.fast.plan import SEEDS_PER_LAYER, can_run, make_weights, step_dtype

_ENCODER = frozenset(
    (
        theirs.ConditionalDetrEncoderLayer,
        structure.EncoderLayer,
        theirs.ConditionalDetrSelfAttention,
        structure.EncoderSelfAttention,
        theirs.ConditionalDetrMLP,
        nn.ReLU,
    )
)
_DECODER = frozenset(
    (
        theirs.ConditionalDetrDecoderLayer,
        theirs.ConditionalDetrDecoderSelfAttention,
        structure.DecoderSelfAttention,
        structure.CrossAttention,
        theirs.ConditionalDetrMLP,
        theirs.ConditionalDetrMLPPredictionHead,
        nn.ModuleList,
        nn.ReLU,
    )
)


class DecoderWeights(NamedTuple):
    """Of the whole decoder."""

    layers: list[fast_decoder.LayerWeights]
    self_position: tuple[Made, Made]
    """Queries and keys of all layers."""
    cross_position: tuple[Made, Made]
    """Of the first layer."""
    memory: tuple[Made, Made]
    """Content keys and values of all layers."""
    spatial: tuple[Made, Made]
    """Spatial keys of all layers."""
    scale: list[Pairs]
    """For each layer the two linear layers that predict λ."""
    norm: tuple[Made, Made]


def encode(encoder: nn.Module, tokens: Tensor, mask: Tensor, position: Tensor | None) -> Tensor | None:
    """The encoder.

    Args:
        encoder: transformers'.
        tokens: [B, N, C].
        mask: [B, N], nonzero = valid.
        position: [B, N, C].

    Returns:
        Memory [B, N, C]; None where the layers have to be called as modules.
    """
    layers = list(encoder.layers)
    # Its sum with tokens is one of the fused outputs, which gives positions no gradient.
    is_position = position is not None and not position.requires_grad
    dtype = _dtype(encoder, layers, tokens, _ENCODER) if is_position else None
    # The largest number of float16 is one that transformers looks at.
    if dtype is None or (encoder.training and tokens.dtype == torch.float16):
        return None
    paths.note("encoder", "fused operations")
    [weights] = make_weights(([_encoder_recipes(layer, tokens.shape[:-1].numel()) for layer in layers],), dtype)
    drawn = seeds(tokens.device, SEEDS_PER_LAYER * len(layers))
    tokens = F.dropout(tokens, encoder.dropout, encoder.training)
    position = position.to(dtype)
    padding = fast_encoder.attention_mask(~mask.to(torch.bool), dtype)
    stream = fast_encoder.begin(tokens.to(dtype), position)
    is_autocast = torch.is_autocast_enabled(tokens.device.type)
    for index, (layer, own) in enumerate(zip(layers, weights, strict=True)):
        settings = _settings(layer, encoder.config.encoder_attention_heads, Dropout(0.0, drawn))
        where = position if index < len(layers) - 1 else None
        stream = fast_encoder.run_layer(own, settings, stream, padding, where, wants_trunk=is_autocast)
    return for_a_module(stream.trunk, stream.out)


def decode(
    decoder: nn.Module, tokens: Tensor, memory: Tensor, mask: Tensor, position: Tensor, object_query: Tensor
) -> dict[str, Tensor | None] | None:
    """The decoder.

    Args:
        decoder: transformers'; its reference points are called as a module.
        tokens, object_query: [B, Q, C].
        memory, position: [B, N, C].
        mask: [B, N], nonzero = valid.

    Returns:
        As `common.decode`; None where the layers have to be called as modules.
    """
    known = [*decoder.layers, decoder.query_scale, decoder.layernorm]
    dtype = _dtype(decoder, known, memory, _DECODER)
    if dtype is None or len(decoder.query_scale.layers) != 2:
        return None
    paths.note("decoder", "fused operations")
    [weights] = make_weights((_decoder_recipes(decoder, object_query, memory),), dtype)
    drawn = seeds(tokens.device, SEEDS_PER_LAYER * len(decoder.layers))
    reference = decoder.ref_point_head(object_query).sigmoid()
    p_s = sine_embedding(reference, object_query.shape[-1], backend=decoder.backend).to(dtype)
    keys = _keys(weights, memory.to(dtype), position.to(dtype), ~mask.to(torch.bool))
    query = object_query.to(dtype)
    positions = linear(query, *weights.self_position).chunk(len(weights.layers), dim=-1)
    first = linear(query, *weights.cross_position)
    norm = _Norm(weights.norm, decoder.layernorm.eps, torch.zeros_like(query))
    out = tokens.to(dtype)
    stream = _Tokens(tokens.to(torch.promote_types(dtype, torch.float32)), (out, out), None)
    states = []
    for index, (layer, own) in enumerate(zip(decoder.layers, weights.layers, strict=True)):
        settings = _settings(layer, decoder.config.decoder_attention_heads, Dropout(0.0, drawn))
        trunk, out = fast_decoder.self_attend(own, settings, positions[index], stream.trunk, stream.outs[0])
        spatial, factor = p_s, None
        if index > 0:
            begin, end = weights.scale[index]
            spatial, factor = linear(hidden(stream.outs[1], begin), *end), p_s
        q_content = linear(out, *own.cross_content)
        q_spatial = fast_decoder.project_spatial_query(spatial, factor, own.cross_sine)
        if index == 0:
            # As in `structure.CrossAttention`: the positions stay out of the keys.
            q_content = q_content + first
            q_spatial = q_content + q_spatial
        attended = _cross_attend(layer.encoder_attn, q_content, q_spatial, keys, index, settings)
        trunk, out = end_branch(attended, trunk, own.cross_attention, settings.dropout)
        stream = _end_layer(out, trunk, own.feed_forward, settings, norm if decoder.config.auxiliary_loss else None)
        states.append(stream.state)
    return {
        "last_hidden_state": norm(stream.trunk, trunks=0, outs=0).state,
        "intermediate_hidden_states": torch.stack(states) if decoder.config.auxiliary_loss else None,
        "reference_points": reference.transpose(0, 1),
    }


class _Tokens(NamedTuple):
    """The tokens between two decoder layers."""

    trunk: Tensor | None
    outs: tuple[Tensor, ...]
    """For self-attention, and for the prediction of λ."""
    state: Tensor | None
    """The same for those outside of the decoder, in the dtype that a module would give."""


class _Norm(NamedTuple):
    """The decoder's own norm, behind layers that have ended with one."""

    weights: tuple[Tensor, Tensor]
    eps: float
    nothing: Tensor
    """[B, Q, C] zeros in the step's dtype: the branch that is added to the trunk."""

    def __call__(self, trunk: Tensor, trunks: int = 1, outs: int = 2) -> _Tokens:
        """[B, Q, C] -> the normalised tokens, as often as they are wanted, and once for others."""
        is_autocast = torch.is_autocast_enabled(trunk.device.type)
        more = {"trunks": trunks + is_autocast, "outs": outs + (not is_autocast)}
        found = list(add_norm(self.nothing, trunk, *self.weights, eps=self.eps, backend="auto", **more))
        state = found.pop(trunks) if is_autocast else found.pop()
        return _Tokens(found[0] if trunks else None, tuple(found[trunks:]), state)


def _end_layer(
    out: Tensor, trunk: Tensor, weights: FeedForwardWeights, settings: fast_encoder.Settings, norm: _Norm | None
) -> _Tokens:
    """The feed-forward network; with a norm its tokens go through that as well."""
    options = {"inner_dropout": settings.inner_dropout}
    if norm is None:
        trunk, *outs = feed_forward(out, trunk, weights, settings.dropout, outs=2, **options)
        return _Tokens(trunk, tuple(outs), None)
    [trunk] = feed_forward(out, trunk, weights, settings.dropout, outs=0, **options)
    return norm(trunk)


class _Keys(NamedTuple):
    """Of all layers."""

    content: tuple[Tensor, ...]
    """[B, N, C] each, as all of them."""
    value: tuple[Tensor, ...]
    spatial: tuple[Tensor, ...]
    padding: Tensor
    """[B, N] bool, True = padding."""


def _keys(weights: DecoderWeights, memory: Tensor, position: Tensor, padding: Tensor) -> _Keys:
    layers = len(weights.layers)
    projected = linear(memory, *weights.memory).chunk(2 * layers, dim=-1)
    spatial = linear(position, *weights.spatial).chunk(layers, dim=-1)
    return _Keys(projected[0::2], projected[1::2], spatial, padding)


def _cross_attend(
    module: nn.Module, q_content: Tensor, q_spatial: Tensor, keys: _Keys, index: int, settings: fast_encoder.Settings
) -> Tensor:
    paths.note("cross-attention", "conditional_attention, dense spatial keys")
    dropout = settings.dropout.of(module.attention_dropout if module.training else 0.0)
    tokens = (q_content, q_spatial, keys.content[index], keys.spatial[index], keys.value[index])
    attended = conditional_attention(
        *(x.unflatten(-1, (settings.heads, -1)) for x in tokens),
        key_padding_mask=keys.padding,
        dropout_p=dropout.probability,
        seed=dropout.seed(),
        backend=module.backend,
    )
    return attended.flatten(-2)


def _dtype(container: nn.Module, known: list[nn.Module], tokens: Tensor, kinds: frozenset[type]) -> torch.dtype | None:
    """What a step computes in; None where the layers of an encoder or decoder have to be called as modules.

    Args:
        known: the parts whose parameters are read.
        kinds: the classes that they may be.
    """
    dtype = step_dtype(tokens.device, tokens.dtype)
    if container.config._attn_implementation not in ("sdpa", "conddetr"):
        return None
    if not can_run(container.backend, tokens.device, dtype):
        return None
    is_checkpointed = any(getattr(part, "gradient_checkpointing", False) and part.training for part in known)
    if is_checkpointed or any(parts.misfit(part, kinds) is not None for part in known):
        return None
    # Fused, all branches of a layer end with one rate.
    if any(_dropout_p(layer) != _dropout_p(layer.mlp) for layer in container.layers):
        return None
    if torch.is_autocast_enabled(tokens.device.type):
        return dtype
    return dtype if all(x.dtype == dtype for part in known for x in part.parameters()) else None


def _settings(layer: nn.Module, heads: int, dropout: Dropout) -> fast_encoder.Settings:
    attention = layer.self_attn
    return fast_encoder.Settings(
        heads,
        attention.attention_dropout if attention.training else 0.0,
        dropout.of(layer.mlp.activation_dropout if layer.mlp.training else 0.0),
        dropout.of(_dropout_p(layer)),
    )


def _dropout_p(module: nn.Module) -> float:
    """The rate that a module drops with now."""
    return module.dropout if module.training else 0.0


def _feed_forward_recipes(layer: nn.Module) -> FeedForwardWeights:
    return FeedForwardWeights(hidden_weights(layer.mlp.fc1), branch_weights(layer.mlp.fc2, layer.final_layer_norm))


def _encoder_recipes(layer: nn.Module, tokens: int) -> fast_encoder.LayerWeights:
    attention = layer.self_attn
    return fast_encoder.LayerWeights(
        parts.stack(attention.q_proj, attention.k_proj, rows=tokens),
        parts.stack(attention.v_proj, rows=tokens),
        branch_weights(attention.o_proj, layer.self_attn_layer_norm),
        _feed_forward_recipes(layer),
    )


def _decoder_recipes(decoder: nn.Module, object_query: Tensor, memory: Tensor) -> DecoderWeights:
    layers = list(decoder.layers)
    own, cross = ([getattr(layer, name) for layer in layers] for name in ("self_attn", "encoder_attn"))
    scale = decoder.query_scale.layers
    queries, tokens = (x.shape[:-1].numel() for x in (object_query, memory))
    return DecoderWeights(
        [_decoder_layer_recipes(layer, queries) for layer in layers],
        parts.stack(
            *(part for attention in own for part in (attention.q_pos_proj, attention.k_pos_proj)), rows=queries
        ),
        parts.stack(cross[0].q_pos_proj, rows=queries),
        parts.stack(
            *(part for attention in cross for part in (attention.k_content_proj, attention.v_proj)), rows=tokens
        ),
        parts.stack(*(attention.k_pos_proj for attention in cross), rows=tokens),
        # The same recipes for all: one weight, whose gradients are added up.
        [[hidden_weights(scale[0], queries), parts.stack(scale[1], rows=queries)]] * len(layers),
        parts.norm(decoder.layernorm),
    )


def _decoder_layer_recipes(layer: nn.Module, queries: int) -> fast_decoder.LayerWeights:
    own, cross = layer.self_attn, layer.encoder_attn
    return fast_decoder.LayerWeights(
        parts.stack(own.q_content_proj, own.k_content_proj, own.v_proj, rows=queries),
        branch_weights(own.o_proj, layer.self_attn_layer_norm),
        parts.stack(cross.q_content_proj, rows=queries),
        parts.stack(cross.q_pos_sine_proj, rows=queries),
        branch_weights(cross.o_proj, layer.encoder_attn_layer_norm),
        _feed_forward_recipes(layer),
    )
