"""The encoder, which all families share. Tokens are [B, N, C].

Source: DETR section 3.2; parameter names are those of the official code.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.model.attention import self_attention
from conddetr.model.layers import FeedForward, initialize_xavier
from conddetr.model.recompute import recomputed


class EncoderSelfAttention(nn.MultiheadAttention):
    """Self-attention whose queries and keys come from one projection; the base class has the official names."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__(config.hidden_dim, config.num_heads, config.dropout)
        self.backend = backend

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

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__(config, backend, num_norms=2)
        self.self_attn = EncoderSelfAttention(config, backend)

    def forward(self, tokens: Tensor, padding: Tensor | None, position: Tensor) -> Tensor:
        """tokens and position [B, N, C], padding [B, N] bool -> [B, N, C]."""
        tokens = self.norm1(self.add(tokens, self.self_attn(tokens, position, padding)))
        return self.norm2(self.add(tokens, self.feed_forward(tokens)))


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.recomputes = False
        """Whether backward recomputes the activations of each layer; see `DETR.checkpoint_activations`."""
        self.layers = nn.ModuleList(EncoderLayer(config, backend) for _ in range(config.encoder_layers))
        initialize_xavier(self)

    def forward(self, tokens: Tensor, padding: Tensor | None, position: Tensor) -> Tensor:
        """tokens [B, N, C], position [B or 1, N, C], padding [B, N] bool -> memory [B, N, C]."""
        for layer in self.layers:
            tokens = recomputed(self, "encoder layer", layer, tokens, padding, position)
        return tokens
