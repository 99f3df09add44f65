"""Attention modules of the conditional decoder. Tokens are [B, N, C].

Source: Conditional DETR section 3.2; parameter names are those of the official code.
"""

from typing import NamedTuple

from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.kernels import conditional_attention, paths
from conddetr.model.attention import self_attention
from conddetr.model.grid import FeatureGrid


class Keys(NamedTuple):
    """Keys and values of one layer's cross-attention."""

    content: Tensor
    """[B, N, C] content keys."""
    spatial: Tensor | tuple[Tensor, Tensor]
    """[B, N, C] spatial keys, or their two terms: [B, h, C] of the rows and [B, w, C] of the columns."""
    value: Tensor
    """[B, N, C]."""


class ProjectedSelfAttention(nn.Module):
    """Scaled dot-product attention of projected queries, keys and values, with an output projection."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.backend = backend
        self.out_proj = nn.Linear(config.hidden_dim, config.hidden_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value [B, Q, C] -> [B, Q, C]."""
        dropout_p = self.dropout if self.training else 0.0
        return self.out_proj(self_attention(query, key, value, self.num_heads, None, dropout_p, self.backend))


class ConditionalCrossAttention(nn.Module):
    """Conditional cross-attention (section 3.2) of projected tokens, with an output projection.

    A forward hook here sees everything that a picture of the attention needs.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.backend = backend
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
            valid_cells=grid.valid_cells if is_separable else None,
            key_padding_mask=None if is_separable else grid.padding,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(attended.flatten(-2))

    def split(self, tokens: Tensor) -> Tensor:
        """[B, n, C] -> [B, n, heads, C / heads]."""
        return tokens.unflatten(-1, (self.num_heads, -1))
