"""Encoder and the two decoders. Everything is batch first: tokens are [B, N, C].

Source: DETR section 3.2 and Conditional DETR section 3; parameter names are those of the official code.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.kernels import conditional_attention, paths, sine_embedding
from conddetr.kernels.registry import OPERATIONS
from conddetr.model.layers import MLP, FeedForward, initialize_xavier
from conddetr.model.plain import is_plain_linear, table


class FeatureGrid(NamedTuple):
    """The feature map that the tokens were, row by row, and what of it is padding."""

    size: tuple[int, int]
    """Height and width in cells."""
    padding: Tensor | None
    """[B, N] bool, True = padding; None: nothing is."""
    valid_hw: Tensor | None
    """[B, 2] int32, valid height and width in cells, where `padding` is known to be all outside that rectangle."""


class Keys(NamedTuple):
    """What one layer's cross-attention makes of the memory."""

    content: Tensor
    """[B, N, C] content keys."""
    spatial: Tensor | tuple[Tensor, Tensor]
    """[B, N, C] spatial keys, or [B, h, C] of the rows and [B, w, C] of the columns, to be added."""
    value: Tensor
    """[B, N, C]."""


def attends_natively(backend: str, tokens: Tensor) -> bool:
    """Whether self-attention of such tokens is for our kernels, as it is on CPUs."""
    return OPERATIONS["self_attention"].prefer(backend, tokens.device, tokens.dtype).backend == "native"


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    padding: Tensor | None,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """Scaled dot-product attention of projected tokens [B, N, C]; padding [B, N] bool -> [B, N, C].

    By PyTorch, which has no fused kernel with dropout on a CPU: there, native kernels of the backend take it as
    conditional attention, whose content and spatial part are the two halves of each head's channels.
    """
    heads = [x.unflatten(-1, (num_heads, -1)) for x in (query, key, value)]
    if attends_natively(backend, query):
        paths.note("self-attention", "conditional_attention")
        half = heads[0].shape[-1] // 2
        queries, keys = (x.tensor_split((half,), dim=-1) for x in heads[:2])
        attended = conditional_attention(
            *queries, *keys, heads[2], key_padding_mask=padding, dropout_p=dropout_p, backend="native"
        )
        return attended.flatten(-2)
    paths.note("self-attention", "PyTorch's scaled_dot_product_attention")
    # One row per image that all heads and queries share: fused kernels take that form, without a copy of N × N numbers.
    visible = None if padding is None else ~padding[:, None, None, :]
    attended = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in heads), attn_mask=visible, dropout_p=dropout_p
    )
    return attended.transpose(1, 2).flatten(-2)


class EncoderSelfAttention(nn.MultiheadAttention):
    """Self-attention whose queries and keys come from one projection; its base class has the official names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_dim, config.num_heads, config.dropout)
        self.backend = config.backend

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """tokens and position [B, N, C], padding [B, N] bool -> [B, N, C]."""
        split = (2 * self.embed_dim, self.embed_dim)
        weights, biases = self.in_proj_weight.split(split), self.in_proj_bias.split(split)
        query, key = F.linear(tokens + position, weights[0], biases[0]).chunk(2, dim=-1)
        value = F.linear(tokens, weights[1], biases[1])
        dropout_p = self.dropout if self.training else 0.0
        return self.out_proj(self_attention(query, key, value, self.num_heads, padding, dropout_p, self.backend))


class EncoderLayer(FeedForward):
    """Self-attention over the feature map; positions are added to queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, num_norms=2)
        self.self_attn = EncoderSelfAttention(config)

    def forward(self, tokens: Tensor, padding: Tensor | None, position: Tensor) -> Tensor:
        """tokens and position [B, N, C], padding [B, N] bool -> [B, N, C]."""
        tokens = self.norm1(self.add(tokens, self.self_attn(tokens, position, padding)))
        return self.norm2(self.add(tokens, self.feed_forward(tokens)))


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        initialize_xavier(self)

    def forward(self, tokens: Tensor, padding: Tensor | None, position: Tensor) -> Tensor:
        """tokens [B, N, C], position [B or 1, N, C], padding [B, N] bool -> memory [B, N, C]."""
        for layer in self.layers:
            tokens = layer(tokens, padding, position)
        return tokens


class ProjectedSelfAttention(nn.Module):
    """Scaled dot-product attention of projected queries, keys and values, with an output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.backend = config.backend
        self.out_proj = nn.Linear(config.hidden_dim, config.hidden_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value [B, Q, C] -> [B, Q, C]."""
        dropout_p = self.dropout if self.training else 0.0
        return self.out_proj(self_attention(query, key, value, self.num_heads, None, dropout_p, self.backend))


class ConditionalCrossAttention(nn.Module):
    """Conditional cross-attention (section 3.2) of projected tokens, with an output projection.

    Its inputs are all that a picture of the attention needs: a forward hook here sees them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.backend = config.backend
        self.out_proj = nn.Linear(config.hidden_dim, config.hidden_dim)

    def forward(self, q_content: Tensor, q_spatial: Tensor, keys: Keys, grid: FeatureGrid) -> Tensor:
        """q_* [B, Q, C], keys over the cells of the grid -> [B, Q, C]."""
        is_separable = isinstance(keys.spatial, tuple)
        paths.note("cross-attention", f"conditional_attention, {'separable' if is_separable else 'dense'} spatial keys")
        k_spatial = tuple(map(self.split, keys.spatial)) if is_separable else self.split(keys.spatial)
        attended = conditional_attention(
            self.split(q_content),
            self.split(q_spatial),
            self.split(keys.content),
            k_spatial,
            self.split(keys.value),
            valid_hw=grid.valid_hw if is_separable else None,
            key_padding_mask=None if is_separable else grid.padding,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(attended.flatten(-2))

    def split(self, tokens: Tensor) -> Tensor:
        """[B, n, C] -> [B, n, heads, C / heads]."""
        return tokens.unflatten(-1, (self.num_heads, -1))


class ConditionalDecoderLayer(FeedForward):
    """One decoder layer of Conditional DETR."""

    def __init__(self, config: ModelConfig, is_first: bool) -> None:
        super().__init__(config, num_norms=3)
        dim = config.hidden_dim
        self.is_first = is_first
        self.csq = config.csq
        self.sa_qcontent_proj = nn.Linear(dim, dim)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kcontent_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = ProjectedSelfAttention(config)
        self.ca_qcontent_proj = nn.Linear(dim, dim)
        if is_first:
            self.ca_qpos_proj = nn.Linear(dim, dim)
        self.ca_kcontent_proj = nn.Linear(dim, dim)
        self.ca_kpos_proj = nn.Linear(dim, dim)
        self.ca_v_proj = nn.Linear(dim, dim)
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)
        self.cross_attn = ConditionalCrossAttention(config)

    def forward(
        self,
        tokens: Tensor,
        keys: Keys,
        grid: FeatureGrid,
        object_query: Tensor,
        p_s: Tensor,
        query_scale: MLP | None,
    ) -> Tensor:
        """One layer.

        Args:
            tokens: [B, Q, C] decoder embedding f of the layer before, not normalised; zeros at first.
            keys: keys and values of this layer's cross-attention.
            grid: size and padding of the feature map that they come from.
            object_query: [Q, C], the same for every image.
            p_s: [Q, C] embedding of the reference points.
            query_scale: MLP that predicts λ, where the form of the spatial query has one.

        Returns:
            [B, Q, C].
        """
        embedding = tokens
        attended = self.self_attn(
            self.sa_qcontent_proj(tokens) + self.sa_qpos_proj(object_query),
            self.sa_kcontent_proj(tokens) + self.sa_kpos_proj(object_query),
            self.sa_v_proj(tokens),
        )
        tokens = self.norm1(self.add(tokens, attended))

        q_content = self.ca_qcontent_proj(tokens)
        q_spatial = self.ca_qpos_sine_proj(self._spatial_query(embedding, tokens, p_s, query_scale))
        q_spatial = q_spatial.expand_as(q_content)
        if self.is_first:
            # The official code adds the positions to the content here: (q + q_p)·(k + k_p) + q_s·k_p. The same is
            # (q + q_p)·k + (q + q_p + q_s)·k_p, which leaves the keys alone.
            q_content = q_content + self.ca_qpos_proj(object_query)
            q_spatial = q_content + q_spatial
        tokens = self.norm2(self.add(tokens, self.cross_attn(q_content, q_spatial, keys, grid)))
        return self.norm3(self.add(tokens, self.feed_forward(tokens)))

    def project_keys(self, memory: Tensor, position: Tensor) -> Keys:
        """This layer's keys, dense: memory [B, N, C] and position [B or 1, N, C]."""
        k_spatial = self.ca_kpos_proj(position).expand(memory.shape[0], -1, -1)
        return Keys(self.ca_kcontent_proj(memory), k_spatial, self.ca_v_proj(memory))

    def _spatial_query(self, embedding: Tensor, self_attended: Tensor, p_s: Tensor, query_scale: MLP | None) -> Tensor:
        """The conditional spatial query before its projection (section 3.3 and 4.3), [B, Q, C].

        [Q, C] where it is the same for every image. λ is 1 in the first layer, where the decoder embedding is zero and
        says nothing.
        """
        if self.csq == "C":
            return embedding
        if self.csq == "P" or (self.is_first and self.csq != "T"):
            return p_s
        if self.is_first:
            return torch.ones_like(embedding)
        transform = query_scale(self_attended if self.csq == "I" else embedding)
        return transform if self.csq == "T" else transform * p_s


def project_all_keys(
    layers: Iterable[ConditionalDecoderLayer], memory: Tensor, position: Tensor, size: tuple[int, int]
) -> list[Keys]:
    """Keys of all layers from two matrix products: one over the memory, one over rows and columns.

    Inside the valid rectangle the encoding of cell (y, x) is [PE(y); PE(x)], so its projection is a row's part plus a
    column's.

    Args:
        layers: L of them.
        memory: [B, N, C].
        position: [B or 1, N, C], of a grid whose padding, if any, is at the bottom and right.
        size: height and width of the grid.
    """
    layers = list(layers)
    content_and_value = [projection for layer in layers for projection in (layer.ca_kcontent_proj, layer.ca_v_proj)]
    projected = project_together(memory, content_and_value)
    spatial = _separable_keys([layer.ca_kpos_proj for layer in layers], position, size, memory.shape[0])
    return [Keys(*keys) for keys in zip(projected[0::2], spatial, projected[1::2], strict=True)]


def project_together(x: Tensor, projections: list[nn.Module]) -> list[Tensor]:
    """Several projections of the same [..., C]: one matrix product for those that are plain linear layers, a call of
    the module for each of the others.
    """
    called, plain = _call_others(x, projections)
    if not plain:
        return called
    weight, bias = _stacked(plain)
    parts = iter(F.linear(x, weight, bias).split([projection.out_features for projection in plain], dim=-1))
    return [next(parts) if made is None else made for made in called]


def _call_others(x: Tensor, projections: list[nn.Module]) -> tuple[list[Tensor | None], list[nn.Linear]]:
    """What each projection makes of x, None for the plain linear layers; and those."""
    called = [None if is_plain_linear(projection) else projection(x) for projection in projections]
    for made in called:
        paths.note("key projections", "one product" if made is None else "modules")
    return called, [projection for projection, made in zip(projections, called, strict=True) if made is None]


def _stacked(projections: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Weights and biases, one below the other."""
    return tuple(torch.cat([getattr(projection, name) for projection in projections]) for name in ("weight", "bias"))


def _separable_keys(
    projections: list[nn.Module], position: Tensor, size: tuple[int, int], batch: int
) -> list[Tensor | tuple[Tensor, Tensor]]:
    """The spatial keys of each layer: those of rows and columns, or dense where the projection is no plain linear
    layer, whose parts would not add up.
    """
    called, plain = _call_others(position, projections)
    dense = [None if made is None else made.expand(batch, -1, -1) for made in called]
    if not plain:
        return dense
    half = position.shape[-1] // 2
    cells = position.unflatten(1, size)
    weight, bias = _stacked(plain)
    # The first cell of a row or column is valid if any is.
    rows = F.linear(cells[:, :, 0, :half], weight[:, :half], bias)
    columns = F.linear(cells[:, 0, :, half:], weight[:, half:])
    parts = zip(*(part.expand(batch, -1, -1).chunk(len(plain), dim=-1) for part in (rows, columns)), strict=True)
    return [next(parts) if made is None else made for made in dense]


class ConditionalDecoder(nn.Module):
    """The decoder of Conditional DETR, with the reference points of its object queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.backend = config.backend
        self.layers = nn.ModuleList(
            ConditionalDecoderLayer(config, is_first=index == 0) for index in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, 2) if config.csq in ("full", "T", "I") else None
        self.ref_point_head = MLP(dim, dim, 2, 2) if config.reference_points == "generated" else None
        self.reference_embed = None
        initialize_xavier(self)
        if config.reference_points == "learned":
            self.reference_embed = nn.Embedding(config.num_queries, 2)
            nn.init.uniform_(self.reference_embed.weight, -2.0, 2.0)

    def reference_logits(self, object_query: Tensor) -> Tensor:
        """Reference points s before the sigmoid: object queries [Q, C] -> [Q, 2] as (x, y)."""
        if self.ref_point_head is not None:
            return self.ref_point_head(object_query)
        if self.reference_embed is not None:
            return table(self.reference_embed, object_query.shape[0], object_query.device)
        return object_query.new_zeros(object_query.shape[0], 2)

    def forward(
        self, memory: Tensor, grid: FeatureGrid, position: Tensor, object_query: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode the object queries against the memory.

        Args:
            memory: [B, N, C]; grid: where its tokens lie; position: [B or 1, N, C]; object_query: [Q, C].

        Returns:
            Normalised outputs of all layers, [L, B, Q, C], and sigmoid reference points, [Q, 2].
        """
        # Positions need float32 also under autocast; queries are few.
        with torch.autocast(memory.device.type, enabled=False):
            reference = self.reference_logits(object_query).sigmoid()
            p_s = sine_embedding(reference, object_query.shape[-1], backend=self.backend)
        tokens = object_query.new_zeros(memory.shape[0], *object_query.shape)
        outputs = []
        for layer, keys in zip(self.layers, self._keys(memory, grid, position), strict=True):
            tokens = layer(tokens, keys, grid, object_query, p_s, self.query_scale)
            outputs.append(self.norm(tokens))
        return torch.stack(outputs), reference

    def _keys(self, memory: Tensor, grid: FeatureGrid, position: Tensor) -> Iterator[Keys]:
        """Keys of each layer: all at once and separable for the kernels, else layer by layer as the official code.

        A mask that came without a rectangle may have any shape, so its keys are dense.
        """
        if self.backend != "eager" and (grid.padding is None or grid.valid_hw is not None):
            yield from project_all_keys(self.layers, memory, position, grid.size)
        else:
            for layer in self.layers:
                yield layer.project_keys(memory, position)


class DETRDecoderLayer(FeedForward):
    """One decoder layer of the original DETR."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, num_norms=3)
        make = {"batch_first": True, "dropout": config.dropout}
        self.self_attn = nn.MultiheadAttention(config.hidden_dim, config.num_heads, **make)
        self.multihead_attn = nn.MultiheadAttention(config.hidden_dim, config.num_heads, **make)

    def forward(
        self,
        tokens: Tensor,
        memory: Tensor,
        padding: Tensor | None,
        position: Tensor | None,
        object_query: Tensor,
    ) -> Tensor:
        """tokens [B, Q, C], memory [B, N, C], object_query [Q, C] -> [B, Q, C].

        `position` None: cross-attention by content alone, without the object query and the keys' positions.
        """
        query = tokens + object_query
        attended, _ = self.self_attn(query, query, tokens, need_weights=False)
        tokens = self.norm1(self.add(tokens, attended))
        query, key = tokens, memory
        if position is not None:
            query, key = tokens + object_query, memory + position
        attended, _ = self.multihead_attn(query, key, memory, key_padding_mask=padding, need_weights=False)
        tokens = self.norm2(self.add(tokens, attended))
        return self.norm3(self.add(tokens, self.feed_forward(tokens)))


class DETRDecoder(nn.Module):
    """The decoder of the original DETR."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DETRDecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.positions_everywhere = config.cross_attention_positions == "all-layers"
        initialize_xavier(self)

    def forward(self, memory: Tensor, grid: FeatureGrid, position: Tensor, object_query: Tensor) -> tuple[Tensor, None]:
        """As `ConditionalDecoder.forward`; there are no reference points."""
        tokens = object_query.new_zeros(memory.shape[0], *object_query.shape)
        outputs = []
        for index, layer in enumerate(self.layers):
            has_position = index == 0 or self.positions_everywhere
            tokens = layer(tokens, memory, grid.padding, position if has_position else None, object_query)
            outputs.append(self.norm(tokens))
        return torch.stack(outputs), None


class Transformer(nn.Module):
    """Encoder and decoder, named as in the official code."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = DETRDecoder(config) if config.family == "detr" else ConditionalDecoder(config)

    def forward(
        self, tokens: Tensor, grid: FeatureGrid, position: Tensor, object_query: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """tokens [B, N, C]; grid: where they lie; position [B or 1, N, C]; object_query [Q, C] -> as the decoder."""
        memory = self.encoder(tokens, grid.padding, position)
        return self.decoder(memory, grid, position, object_query)
