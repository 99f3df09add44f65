"""The conditional decoder from fused operations; values that its layers share are computed once."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.kernels import conditional_attention, paths, sine_embedding, spatial_query
from conddetr.kernels.stack import unstacked
from conddetr.kernels.weights import Weight
from conddetr.model.families.conditional_detr.attention import ConditionalCrossAttention, ProjectedSelfAttention
from conddetr.model.families.conditional_detr.decoder import ConditionalDecoder, ConditionalDecoderLayer
from conddetr.model.fast import parts
from conddetr.model.fast.encoder import Settings, self_attention
from conddetr.model.fast.layers import (
    AddToFirst,
    Branch,
    Dropout,
    FeedForwardWeights,
    Made,
    Pairs,
    branch_weights,
    end_branch,
    feed_forward,
    feed_forward_weights,
    for_a_module,
    hidden,
    hidden_weights,
    linear,
    repeatable,
)
from conddetr.model.grid import FeatureGrid
from conddetr.model.layers import MLP
from conddetr.model.plain import why_not_plain
from conddetr.model.recompute import recomputed

_CLASSES = frozenset((ConditionalDecoderLayer, ProjectedSelfAttention, ConditionalCrossAttention, MLP, nn.ModuleList))


class LayerWeights(NamedTuple):
    """Weights of one decoder layer."""

    self_content: tuple[Made, Made]
    """Queries, keys and values, without position."""
    self_attention: Branch
    cross_content: tuple[Made, Made]
    cross_sine: tuple[Made, Made]
    cross_attention: Branch
    feed_forward: FeedForwardWeights


class DecoderWeights(NamedTuple):
    """Weights of the whole decoder."""

    layers: list[LayerWeights]
    object_query: tuple[Made, Made]
    """One copy for self-attention, one for the first cross-attention."""
    self_position: tuple[Made, Made]
    """Queries and keys of all layers."""
    cross_position: tuple[Made, Made]
    """Queries of the first layer."""
    memory: tuple[Made, Made]
    """Content keys and values of all layers."""
    cell_position: tuple[Made, Made]
    """Spatial keys of all layers."""
    scale: list[Pairs]
    """The two linear layers that predict λ, for each layer; empty if the variant of the spatial query has no λ."""


class Grid(NamedTuple):
    """Keys and values of all layers."""

    content: tuple[Tensor, ...]
    """[B, N, C] each."""
    rows: tuple[Tensor, ...]
    """[B or 1, h, C] each: rows plus columns are the spatial keys."""
    columns: tuple[Tensor, ...]
    """[B or 1, w, C] each."""
    value: tuple[Tensor, ...]
    """[B, N, C] each."""


class Shared(NamedTuple):
    """Values of one forward pass that all layers read."""

    weights: DecoderWeights
    positions: tuple[Tensor, ...]
    """For each layer [B, Q, 2C]: projected positions of self-attention's queries and keys."""
    p_s: Tensor
    """[Q, C] embedding of the reference points."""
    factors: tuple[Tensor, ...]
    """p_s for each layer."""
    keys: Grid
    grid: FeatureGrid


def recipes(
    decoder: ConditionalDecoder, object_query: Tensor, images: int, tokens: int | None
) -> DecoderWeights | None:
    """Recipes of all weights except those of the reference points; None if a part has to be called as a module.

    Args:
        decoder: the module.
        object_query: [Q, C], the parameter.
        images: number of images in the batch.
        tokens: number of memory tokens of all images; None: not known yet.
    """
    known = [*decoder.layers, *([] if decoder.query_scale is None else [decoder.query_scale])]
    if any(parts.misfit(part, _CLASSES) is not None for part in known):
        return None
    layers = list(decoder.layers)
    scale = [] if decoder.query_scale is None else list(decoder.query_scale.layers)
    queries, query = object_query.shape[0], Weight((object_query,))
    rows = images * queries
    return DecoderWeights(
        [_recipes(layer, rows, queries) for layer in layers],
        (query, query),
        parts.stack(*(part for layer in layers for part in (layer.sa_qpos_proj, layer.sa_kpos_proj)), rows=queries),
        parts.stack(layers[0].ca_qpos_proj, rows=queries),
        parts.stack(*(part for layer in layers for part in (layer.ca_kcontent_proj, layer.ca_v_proj)), rows=tokens),
        parts.stack(*(layer.ca_kpos_proj for layer in layers)),
        # All layers share the recipes: one weight, whose gradients are summed.
        [[hidden_weights(scale[0], rows), parts.stack(scale[1], rows=rows)]] * len(layers) if scale else [],
    )


def _recipes(layer: ConditionalDecoderLayer, rows: int, queries: int) -> LayerWeights:
    return LayerWeights(
        parts.stack(layer.sa_qcontent_proj, layer.sa_kcontent_proj, layer.sa_v_proj, rows=rows),
        branch_weights(layer.self_attn.out_proj, layer.norm1),
        parts.stack(layer.ca_qcontent_proj, rows=rows),
        parts.stack(layer.ca_qpos_sine_proj, rows=queries if _is_for_all_images(layer) else rows),
        branch_weights(layer.cross_attn.out_proj, layer.norm2),
        feed_forward_weights(layer, layer.norm3),
    )


def decode(
    decoder: ConditionalDecoder,
    weights: DecoderWeights,
    memory: Tensor,
    grid: FeatureGrid,
    position: Tensor,
    object_query: Tensor,
    seeds: Iterator[Tensor],
) -> tuple[Tensor, Tensor]:
    """Run the decoder on a batch whose valid part is a rectangle; see `ConditionalDecoder.forward`.

    Args:
        decoder: its norm and its reference points are called as modules.
        weights: of its layers.
        memory, position: in the step's dtype.
        seeds: of dropout.
    """
    with torch.autocast(memory.device.type, enabled=False):
        reference = decoder.reference_logits(object_query).sigmoid()
        p_s = sine_embedding(reference, object_query.shape[-1], backend=decoder.backend).to(memory.dtype)
    keys = _keys(weights, memory, position, grid.size)
    batch, layers = memory.shape[0], len(weights.layers)
    # Tensors that images or layers share are expanded before they are split, so that one kernel sums their gradients.
    positions = linear(weights.object_query[0], *weights.self_position).expand(batch, -1, -1).chunk(layers, dim=-1)
    factors = (p_s, *unstacked(p_s.expand(max(layers - 1, 1), -1, -1)))
    shared = Shared(weights, positions, p_s, factors, keys, grid)
    out = memory.new_zeros(memory.shape[0], *object_query.shape)
    stream = (out.to(torch.promote_types(out.dtype, torch.float32)), out, out)
    outputs = []
    for index, layer in enumerate(decoder.layers):
        unit = partial(_run_layer, shared, layer, index, repeatable(seeds))
        trunk, output, *outs = recomputed(decoder, "decoder layer", unit, *stream)
        stream = (trunk, *outs)
        outputs.append((output, outs[0]))
    return _normalized(decoder.norm, [for_a_module(*output) for output in outputs]), reference


def _run_layer(
    shared: Shared,
    layer: ConditionalDecoderLayer,
    index: int,
    seeds: Callable[[], Iterator[Tensor]],
    trunk: Tensor,
    *outs: Tensor,
) -> tuple[Tensor, ...]:
    """One layer of `decode`.

    Args:
        index: of the layer.
        seeds: returns the layer's seeds of dropout, the same in every call.
        trunk, outs: [B, Q, C] tokens: the residual stream, and twice in the step's dtype.

    Returns:
        The trunk twice, then the tokens twice in the step's dtype: two tensors for two users each.
    """
    paths.note("decoder layer", "fused operations")
    weights, layer_weights, layer_seeds = shared.weights, shared.weights.layers[index], seeds()
    dropout = Dropout(layer.dropout if layer.training else 0.0, layer_seeds)
    attention = layer.self_attn
    attention_dropout = attention.dropout if attention.training else 0.0
    settings = Settings(attention.num_heads, attention_dropout, dropout, dropout)
    trunk, out = self_attend(layer_weights, settings, shared.positions[index], trunk, outs[0])
    scale = weights.scale and weights.scale[index]
    # In variant I of the spatial query λ is predicted from these tokens.
    spatial, factor = _spatial_query(layer, scale, shared.p_s, shared.factors[index], outs[1], out)
    q_content = linear(out, *layer_weights.cross_content)
    q_spatial = project_spatial_query(spatial, factor, layer_weights.cross_sine).expand_as(q_content)
    if layer.is_first:
        # As in `ConditionalDecoderLayer.forward`: positions are not added to the keys.
        q_content = q_content + linear(weights.object_query[1], *weights.cross_position)
        q_spatial = q_content + q_spatial
    attended = _cross_attend(layer.cross_attn, q_content, q_spatial, shared.keys, index, shared.grid, layer_seeds)
    trunk, out = end_branch(attended, trunk, layer_weights.cross_attention, dropout)
    return feed_forward(out, trunk, layer_weights.feed_forward, dropout, trunks=2, outs=2)


def _normalized(norm: nn.Module, outputs: list[Tensor]) -> Tensor:
    """Normalise all layers at once, [L, B, Q, C]; a norm that is not plain is called for each layer."""
    if type(norm) is nn.LayerNorm and why_not_plain(norm) is None:
        return norm(torch.stack(outputs))
    return torch.stack([norm(output) for output in outputs])


def _keys(weights: DecoderWeights, memory: Tensor, position: Tensor, size: tuple[int, int]) -> Grid:
    """Keys and values of all layers: one product over the memory, and one over rows and columns."""
    layers = len(weights.layers)
    projected = linear(memory, *weights.memory).chunk(2 * layers, dim=-1)
    # Inside the valid rectangle the encoding of a cell is [PE(y); PE(x)], so its projection is the sum of a row term
    # and a column term. The first cell of a row or column is valid if any is.
    cells = position.unflatten(1, size)
    height, half = size[0], position.shape[-1] // 2
    ends = position.new_zeros(len(position), sum(size), position.shape[-1])
    ends[:, :height, :half] = cells[:, :, 0, :half]
    ends[:, height:, half:] = cells[:, 0, :, half:]
    weight, bias = weights.cell_position
    rows, columns = F.linear(ends, weight).split(size, dim=1)
    return Grid(projected[0::2], (rows + bias).chunk(layers, dim=-1), columns.chunk(layers, dim=-1), projected[1::2])


def self_attend(
    weights: LayerWeights, settings: Settings, position: Tensor, trunk: Tensor, out: Tensor
) -> tuple[Tensor, ...]:
    """Run the self-attention branch of a layer.

    Args:
        position: [B, Q, 2C] or [Q, 2C], projected positions of queries and keys.
        trunk, out: [B, Q, C] tokens, as in the encoder.
    """
    projected = AddToFirst.apply(linear(out, *weights.self_content), position)
    attended = self_attention(*projected.chunk(3, dim=-1), settings, None)
    return end_branch(attended, trunk, weights.self_attention, settings.dropout)


def _spatial_query(
    layer: ConditionalDecoderLayer,
    scale: Pairs,
    p_s: Tensor,
    factor: Tensor,
    embedding: Tensor,
    self_attended: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The conditional spatial query before its projection: as two factors λ and p_s, or as the query and None.

    `scale`: weights of the MLP that predicts λ; `factor`: p_s, expanded for this layer.
    """
    if layer.csq == "C":
        return embedding, None
    if _is_for_all_images(layer):
        return p_s, None
    if layer.is_first:
        return torch.ones_like(embedding), None
    first, last = scale
    transform = linear(hidden(self_attended if layer.csq == "I" else embedding, first), *last)
    return transform, None if layer.csq == "T" else factor


def project_spatial_query(query: Tensor, factor: Tensor | None, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Project a spatial query [..., Q, C], first multiplied by a factor [Q, C] or [..., Q, C] if there is one."""
    return linear(query, *weights) if factor is None else spatial_query(query, factor, *weights)


def _is_for_all_images(layer: ConditionalDecoderLayer) -> bool:
    """Whether the spatial query depends on the reference points alone."""
    return layer.csq == "P" or (layer.is_first and layer.csq not in ("C", "T"))


def _cross_attend(
    module: ConditionalCrossAttention,
    q_content: Tensor,
    q_spatial: Tensor,
    keys: Grid,
    index: int,
    grid: FeatureGrid,
    seeds: Iterator[Tensor],
) -> Tensor:
    paths.note("cross-attention", "conditional_attention, separable spatial keys")
    dropout = Dropout(module.dropout if module.training else 0.0, seeds)
    attended = conditional_attention(
        module.split(q_content),
        module.split(q_spatial),
        module.split(keys.content[index]),
        (module.split(keys.rows[index]), module.split(keys.columns[index])),
        module.split(keys.value[index]),
        valid_cells=grid.valid_cells,
        dropout_p=dropout.probability,
        seed=dropout.seed(),
        backend=module.backend,
    )
    return attended.flatten(-2)
