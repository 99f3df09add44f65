"""Encoder and the two decoders. Everything is batch first: tokens are [B, N, C].

Source: DETR section 3.2 and Conditional DETR section 3; parameter names are those of the official code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.kernels import conditional_attention, conditional_spatial_query, sine_embedding
from conddetr.model.layers import MLP, FeedForward, initialize_xavier


class EncoderLayer(FeedForward):
    """Self-attention over the feature map; positions are added to queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_dim, config.ffn_dim, config.dropout, num_norms=2)
        self.self_attn = nn.MultiheadAttention(config.hidden_dim, config.num_heads, config.dropout, batch_first=True)

    def forward(self, tokens: Tensor, padding: Tensor | None, position: Tensor) -> Tensor:
        """tokens and position [B, N, C], padding [B, N] bool -> [B, N, C]."""
        query = tokens + position
        attended, _ = self.self_attn(query, query, tokens, key_padding_mask=padding, need_weights=False)
        tokens = self.norm1(tokens + self.dropout(attended))
        return self.norm2(tokens + self.dropout(self.feed_forward(tokens)))


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        initialize_xavier(self)

    def forward(self, tokens: Tensor, padding: Tensor | None, position: Tensor) -> Tensor:
        """tokens and position [B, N, C], padding [B, N] bool -> memory [B, N, C]."""
        for layer in self.layers:
            tokens = layer(tokens, padding, position)
        return tokens


class ProjectedSelfAttention(nn.Module):
    """Scaled dot-product attention of projected queries, keys and values, with an output projection."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value [B, Q, C] -> [B, Q, C]."""
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(attended.transpose(1, 2).flatten(-2))


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

    def forward(
        self,
        q_content: Tensor,
        q_spatial: Tensor,
        k_content: Tensor,
        k_spatial: Tensor,
        value: Tensor,
        padding: Tensor | None,
    ) -> Tensor:
        """q_* [B, Q, C], k_*, value [B, N, C], padding [B, N] bool -> [B, Q, C]."""
        parts = (q_content, q_spatial, k_content, k_spatial, value)
        attended = conditional_attention(
            *[part.unflatten(-1, (self.num_heads, -1)) for part in parts],
            key_padding_mask=padding,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(attended.flatten(-2))


class ConditionalDecoderLayer(FeedForward):
    """One decoder layer of Conditional DETR."""

    def __init__(self, config: ModelConfig, is_first: bool) -> None:
        super().__init__(config.hidden_dim, config.ffn_dim, config.dropout, num_norms=3)
        dim = config.hidden_dim
        self.is_first = is_first
        self.csq = config.csq
        self.backend = config.backend
        self.sa_qcontent_proj = nn.Linear(dim, dim)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kcontent_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = ProjectedSelfAttention(dim, config.num_heads, config.dropout)
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
        memory: Tensor,
        padding: Tensor | None,
        position: Tensor,
        object_query: Tensor,
        reference: Tensor,
        query_scale: MLP | None,
    ) -> Tensor:
        """One layer.

        Args:
            tokens: [B, Q, C] decoder embedding f of the layer before, not normalised; zeros at first.
            memory: [B, N, C] encoder output.
            padding: [B, N] bool, True = padding, or None.
            position: [B, N, C] position encoding of the memory.
            object_query: [Q, C], the same for every image.
            reference: [Q, 2] sigmoid reference points (x, y).
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
        tokens = self.norm1(tokens + self.dropout(attended))

        spatial_query = self._spatial_query(embedding, tokens, reference, query_scale)
        q_content = self.ca_qcontent_proj(tokens)
        k_content = self.ca_kcontent_proj(memory)
        k_spatial = self.ca_kpos_proj(position)
        if self.is_first:
            q_content = q_content + self.ca_qpos_proj(object_query)
            k_content = k_content + k_spatial
        attended = self.cross_attn(
            q_content,
            self.ca_qpos_sine_proj(spatial_query),
            k_content,
            k_spatial,
            self.ca_v_proj(memory),
            padding,
        )
        tokens = self.norm2(tokens + self.dropout(attended))
        return self.norm3(tokens + self.dropout(self.feed_forward(tokens)))

    def _spatial_query(
        self, embedding: Tensor, self_attended: Tensor, reference: Tensor, query_scale: MLP | None
    ) -> Tensor:
        """The conditional spatial query before its projection, [B, Q, C] (section 3.3 and 4.3).

        λ is 1 in the first layer, where the decoder embedding is zero and says nothing.
        """
        if self.csq == "C":
            return embedding
        if self.csq == "P" or (self.is_first and self.csq != "T"):
            p_s = sine_embedding(reference, embedding.shape[-1], backend=self.backend)
            return p_s.to(embedding.dtype).expand_as(embedding)
        if self.is_first:
            return torch.ones_like(embedding)
        transform = query_scale(self_attended if self.csq == "I" else embedding)
        if self.csq == "T":
            return transform
        return conditional_spatial_query(reference, transform, backend=self.backend).to(embedding.dtype)


class ConditionalDecoder(nn.Module):
    """The decoder of Conditional DETR, with the reference points of its object queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
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
            return self.reference_embed.weight
        return object_query.new_zeros(object_query.shape[0], 2)

    def forward(
        self, memory: Tensor, padding: Tensor | None, position: Tensor, object_query: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode the object queries against the memory.

        Args:
            memory: [B, N, C]; padding: [B, N] bool or None; position: [B, N, C]; object_query: [Q, C].

        Returns:
            Normalised outputs of all layers, [L, B, Q, C], and sigmoid reference points, [Q, 2].
        """
        reference = self.reference_logits(object_query).sigmoid()
        tokens = object_query.new_zeros(memory.shape[0], *object_query.shape)
        outputs = []
        for layer in self.layers:
            tokens = layer(tokens, memory, padding, position, object_query, reference, self.query_scale)
            outputs.append(self.norm(tokens))
        return torch.stack(outputs), reference


class DETRDecoderLayer(FeedForward):
    """One decoder layer of the original DETR."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_dim, config.ffn_dim, config.dropout, num_norms=3)
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
        tokens = self.norm1(tokens + self.dropout(attended))
        query, key = tokens, memory
        if position is not None:
            query, key = tokens + object_query, memory + position
        attended, _ = self.multihead_attn(query, key, memory, key_padding_mask=padding, need_weights=False)
        tokens = self.norm2(tokens + self.dropout(attended))
        return self.norm3(tokens + self.dropout(self.feed_forward(tokens)))


class DETRDecoder(nn.Module):
    """The decoder of the original DETR."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DETRDecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.positions_everywhere = config.cross_attention_positions == "all-layers"
        initialize_xavier(self)

    def forward(
        self, memory: Tensor, padding: Tensor | None, position: Tensor, object_query: Tensor
    ) -> tuple[Tensor, None]:
        """As `ConditionalDecoder.forward`; there are no reference points."""
        tokens = object_query.new_zeros(memory.shape[0], *object_query.shape)
        outputs = []
        for index, layer in enumerate(self.layers):
            has_position = index == 0 or self.positions_everywhere
            tokens = layer(tokens, memory, padding, position if has_position else None, object_query)
            outputs.append(self.norm(tokens))
        return torch.stack(outputs), None


class Transformer(nn.Module):
    """Encoder and decoder, named as in the official code."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = DETRDecoder(config) if config.family == "detr" else ConditionalDecoder(config)

    def forward(
        self, tokens: Tensor, padding: Tensor | None, position: Tensor, object_query: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """tokens, position [B, N, C]; padding [B, N]; object_query [Q, C] -> as the decoder."""
        memory = self.encoder(tokens, padding, position)
        return self.decoder(memory, padding, position, object_query)
