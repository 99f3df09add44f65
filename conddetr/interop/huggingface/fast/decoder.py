"""The decoder from fused operations."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from conddetr.interop.huggingface.fast.parts import dtype_of_step, feed_forward_recipes, layer_settings
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
    hidden,
    hidden_weights,
    linear,
    seeds,
)
from conddetr.model.fast.plan import SEEDS_PER_LAYER, make_weights


class DecoderWeights(NamedTuple):
    """Weights of the whole decoder."""

    layers: list[fast_decoder.LayerWeights]
    self_position: tuple[Made, Made]
    """For queries and keys of all layers."""
    cross_position: tuple[Made, Made]
    """For queries of the first layer."""
    memory: tuple[Made, Made]
    """For content keys and values of all layers."""
    spatial: tuple[Made, Made]
    """For spatial keys of all layers."""
    scale: list[Pairs]
    """For each layer the two linear layers that predict λ."""
    norm: tuple[Made, Made]


def decode(
    decoder: nn.Module,
    tokens: Tensor,
    memory: Tensor,
    mask: Tensor,
    position: Tensor,
    object_query: Tensor,
    kinds: frozenset[type],
) -> dict[str, Tensor | None] | None:
    """Run the decoder on fused operations.

    Args:
        decoder: transformers' decoder; its reference points are called as a module.
        tokens, object_query: [B, Q, C].
        memory, position: [B, N, C].
        mask: [B, N], nonzero = valid.
        kinds: the classes of the parts of plain layers.

    Returns:
        As `conddetr.interop.huggingface.decoder.decode`; None if the layers have to be called as modules.
    """
    known = [*decoder.layers, decoder.query_scale, decoder.layernorm]
    dtype = dtype_of_step(decoder, known, memory, kinds)
    if dtype is None or len(decoder.query_scale.layers) != 2:
        return None
    paths.note("decoder", "fused operations")
    [weights] = make_weights((_recipes(decoder, object_query, memory),), dtype)
    step_seeds = seeds(tokens.device, SEEDS_PER_LAYER * len(decoder.layers))
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
    for index, (layer, layer_weights) in enumerate(zip(decoder.layers, weights.layers, strict=True)):
        settings = layer_settings(layer, decoder.config.decoder_attention_heads, Dropout(0.0, step_seeds))
        trunk, out = fast_decoder.self_attend(layer_weights, settings, positions[index], stream.trunk, stream.outs[0])
        spatial, factor = p_s, None
        if index > 0:
            begin, end = weights.scale[index]
            spatial, factor = linear(hidden(stream.outs[1], begin), *end), p_s
        q_content = linear(out, *layer_weights.cross_content)
        q_spatial = fast_decoder.project_spatial_query(spatial, factor, layer_weights.cross_sine)
        if index == 0:
            # As in `attention_v5.CrossAttention`, the positions are not added to the keys.
            q_content = q_content + first
            q_spatial = q_content + q_spatial
        attended = _cross_attend(layer.encoder_attn, q_content, q_spatial, keys, index, settings)
        trunk, out = end_branch(attended, trunk, layer_weights.cross_attention, settings.dropout)
        stream = _end_layer(
            out, trunk, layer_weights.feed_forward, settings, norm if decoder.config.auxiliary_loss else None
        )
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
    """The same for use outside the decoder, in the dtype that a module would return."""


class _Norm(NamedTuple):
    """The decoder's own norm, after layers that end with a norm."""

    weights: tuple[Tensor, Tensor]
    eps: float
    nothing: Tensor
    """[B, Q, C] zeros in the step's dtype: the branch that is added to the trunk."""

    def __call__(self, trunk: Tensor, trunks: int = 1, outs: int = 2) -> _Tokens:
        """[B, Q, C] -> the normalised tokens, `trunks` + `outs` times, and once more for use outside the decoder."""
        is_autocast = torch.is_autocast_enabled(trunk.device.type)
        copies = {"trunks": trunks + is_autocast, "outs": outs + (not is_autocast)}
        outputs = list(add_norm(self.nothing, trunk, *self.weights, eps=self.eps, backend="auto", **copies))
        state = outputs.pop(trunks) if is_autocast else outputs.pop()
        return _Tokens(outputs[0] if trunks else None, tuple(outputs[trunks:]), state)


def _end_layer(
    out: Tensor, trunk: Tensor, weights: FeedForwardWeights, settings: fast_encoder.Settings, norm: _Norm | None
) -> _Tokens:
    """The feed-forward network, followed by the norm if there is one."""
    options = {"inner_dropout": settings.inner_dropout}
    if norm is None:
        trunk, *outs = feed_forward(out, trunk, weights, settings.dropout, outs=2, **options)
        return _Tokens(trunk, tuple(outs), None)
    [trunk] = feed_forward(out, trunk, weights, settings.dropout, outs=0, **options)
    return norm(trunk)


class _Keys(NamedTuple):
    """Keys and values of all layers."""

    content: tuple[Tensor, ...]
    """[B, N, C] each, like values and spatial keys."""
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


def _recipes(decoder: nn.Module, object_query: Tensor, memory: Tensor) -> DecoderWeights:
    layers = list(decoder.layers)
    self_attentions, cross_attentions = (
        [getattr(layer, name) for layer in layers] for name in ("self_attn", "encoder_attn")
    )
    scale = decoder.query_scale.layers
    queries, tokens = (x.shape[:-1].numel() for x in (object_query, memory))
    return DecoderWeights(
        [_layer_recipes(layer, queries) for layer in layers],
        parts.stack(
            *(part for attention in self_attentions for part in (attention.q_pos_proj, attention.k_pos_proj)),
            rows=queries,
        ),
        parts.stack(cross_attentions[0].q_pos_proj, rows=queries),
        parts.stack(
            *(part for attention in cross_attentions for part in (attention.k_content_proj, attention.v_proj)),
            rows=tokens,
        ),
        parts.stack(*(attention.k_pos_proj for attention in cross_attentions), rows=tokens),
        # All layers share these recipes: one weight, whose gradients are added up.
        [[hidden_weights(scale[0], queries), parts.stack(scale[1], rows=queries)]] * len(layers),
        parts.norm(decoder.layernorm),
    )


def _layer_recipes(layer: nn.Module, queries: int) -> fast_decoder.LayerWeights:
    self_attention, cross_attention = layer.self_attn, layer.encoder_attn
    return fast_decoder.LayerWeights(
        parts.stack(self_attention.q_content_proj, self_attention.k_content_proj, self_attention.v_proj, rows=queries),
        branch_weights(self_attention.o_proj, layer.self_attn_layer_norm),
        parts.stack(cross_attention.q_content_proj, rows=queries),
        parts.stack(cross_attention.q_pos_sine_proj, rows=queries),
        branch_weights(cross_attention.o_proj, layer.encoder_attn_layer_norm),
        feed_forward_recipes(layer),
    )
