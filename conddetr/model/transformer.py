"""Encoder and decoder. Everything is batch first: tokens are [B, N, C].

Source: DETR section 3.2 and Conditional DETR section 3; parameter names are those of the official code.
"""

from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.model.encoder import Encoder
from conddetr.model.families.table import PARTS
from conddetr.model.grid import FeatureGrid


class Transformer(nn.Module):
    """Encoder and decoder, named as in the official code."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.encoder = Encoder(config, backend)
        self.decoder = PARTS[config.family].decoder(config, backend)

    def forward(
        self, tokens: Tensor, grid: FeatureGrid, position: Tensor, object_query: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """tokens [B, N, C], their grid, position [B or 1, N, C], object_query [Q, C] -> the decoder's outputs."""
        memory = self.encoder(tokens, grid.padding, position)
        return self.decoder(memory, grid, position, object_query)
