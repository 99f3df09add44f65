"""The decoder of the original DETR. Tokens are [B, N, C].

Source: DETR section 3.2; parameter names are those of the official code.
"""

import torch
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.model.grid import FeatureGrid
from conddetr.model.layers import FeedForward, initialize_xavier
from conddetr.model.recompute import recomputed


class DETRDecoderLayer(FeedForward):
    """One decoder layer of the original DETR."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__(config, backend, num_norms=3)
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

        `position` None: cross-attention uses content alone, without the object query and the keys' positions.
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

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.recomputes = False
        """Whether backward recomputes the activations of each layer; see `DETR.checkpoint_activations`."""
        self.layers = nn.ModuleList(DETRDecoderLayer(config, backend) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.positions_everywhere = config.cross_attention_positions == "all-layers"
        initialize_xavier(self)

    def forward(self, memory: Tensor, grid: FeatureGrid, position: Tensor, object_query: Tensor) -> tuple[Tensor, None]:
        """Same as `ConditionalDecoder.forward`, without reference points."""
        tokens = object_query.new_zeros(memory.shape[0], *object_query.shape)
        outputs = []
        for index, layer in enumerate(self.layers):
            has_position = index == 0 or self.positions_everywhere
            inputs = (memory, grid.padding, position if has_position else None, object_query)
            tokens = recomputed(self, "decoder layer", layer, tokens, *inputs)
            outputs.append(self.norm(tokens))
        return torch.stack(outputs), None
