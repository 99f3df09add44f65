"""The decoder of Conditional DETR. Tokens are [B, N, C].

Source: Conditional DETR section 3; parameter names are those of the official code.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.kernels import sine_embedding
from conddetr.model.families.conditional_detr.attention import ConditionalCrossAttention, Keys, ProjectedSelfAttention
from conddetr.model.families.conditional_detr.keys import project_all_keys
from conddetr.model.grid import FeatureGrid
from conddetr.model.layers import MLP, FeedForward, initialize_xavier
from conddetr.model.plain import table
from conddetr.model.recompute import recomputed


class ConditionalDecoderLayer(FeedForward):
    """One decoder layer of Conditional DETR."""

    def __init__(self, config: ModelConfig, backend: str, is_first: bool) -> None:
        super().__init__(config, backend, num_norms=3)
        dim = config.hidden_dim
        self.is_first = is_first
        self.csq = config.csq
        self.sa_qcontent_proj = nn.Linear(dim, dim)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kcontent_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = ProjectedSelfAttention(config, backend)
        self.ca_qcontent_proj = nn.Linear(dim, dim)
        if is_first:
            self.ca_qpos_proj = nn.Linear(dim, dim)
        self.ca_kcontent_proj = nn.Linear(dim, dim)
        self.ca_kpos_proj = nn.Linear(dim, dim)
        self.ca_v_proj = nn.Linear(dim, dim)
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)
        self.cross_attn = ConditionalCrossAttention(config, backend)

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
            tokens: [B, Q, C] decoder embedding f of the previous layer, not normalised; zeros for the first layer.
            keys: keys and values of this layer's cross-attention.
            grid: size and padding of the keys' feature map.
            object_query: [Q, C], the same for every image.
            p_s: [Q, C] embedding of the reference points.
            query_scale: MLP that predicts λ, if the variant of the spatial query has one.

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
            # The official code adds the positions to the content here: (q + q_p)·(k + k_p) + q_s·k_p. This equals
            # (q + q_p)·k + (q + q_p + q_s)·k_p, which leaves the keys unchanged.
            q_content = q_content + self.ca_qpos_proj(object_query)
            q_spatial = q_content + q_spatial
        tokens = self.norm2(self.add(tokens, self.cross_attn(q_content, q_spatial, keys, grid)))
        return self.norm3(self.add(tokens, self.feed_forward(tokens)))

    def project_keys(self, memory: Tensor, position: Tensor) -> Keys:
        """This layer's keys, dense: memory [B, N, C] and position [B or 1, N, C]."""
        k_spatial = self.ca_kpos_proj(position).expand(memory.shape[0], -1, -1)
        return Keys(self.ca_kcontent_proj(memory), k_spatial, self.ca_v_proj(memory))

    def _spatial_query(self, embedding: Tensor, self_attended: Tensor, p_s: Tensor, query_scale: MLP | None) -> Tensor:
        """The conditional spatial query before its projection (sections 3.3 and 4.3), [B, Q, C].

        [Q, C] if it is the same for every image. λ is 1 in the first layer, whose decoder embedding is zero.
        """
        if self.csq == "C":
            return embedding
        if self.csq == "P" or (self.is_first and self.csq != "T"):
            return p_s
        if self.is_first:
            return torch.ones_like(embedding)
        transform = query_scale(self_attended if self.csq == "I" else embedding)
        return transform if self.csq == "T" else transform * p_s


class ConditionalDecoder(nn.Module):
    """The decoder of Conditional DETR, with the reference points of its object queries."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.backend = backend
        self.recomputes = False
        """Whether backward recomputes the activations of each layer; see `DETR.checkpoint_activations`."""
        self.layers = nn.ModuleList(
            ConditionalDecoderLayer(config, backend, is_first=index == 0) for index in range(config.decoder_layers)
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
            memory: [B, N, C]; grid: of its tokens; position: [B or 1, N, C]; object_query: [Q, C].

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
            inputs = (keys, grid, object_query, p_s, self.query_scale)
            tokens = recomputed(self, "decoder layer", layer, tokens, *inputs)
            outputs.append(self.norm(tokens))
        return torch.stack(outputs), reference

    def _keys(self, memory: Tensor, grid: FeatureGrid, position: Tensor) -> Iterator[Keys]:
        """Keys of each layer: separable and for all layers at once for our kernels, else layer by layer and dense.

        A mask without a valid rectangle may have any shape, so its keys are dense.
        """
        if self.backend != "eager" and (grid.padding is None or grid.valid_cells is not None):
            yield from project_all_keys(self.layers, memory, position, grid.size)
        else:
            for layer in self.layers:
                yield layer.project_keys(memory, position)
