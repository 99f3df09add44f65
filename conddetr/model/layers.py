"""Small pieces that several parts of the model share."""

from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them; named `layers.{i}` as in the official code."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, num_layers: int) -> None:
        super().__init__()
        widths = [dim_in] + [dim_hidden] * (num_layers - 1) + [dim_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim_in] -> [..., dim_out]."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """Base of the transformer layers: residual branches with dropout and norm after, and the FFN.

    The attributes carry the official names, hence this is inherited and not a submodule.
    """

    def __init__(self, dim: int, ffn_dim: int, dropout: float, num_norms: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)
        for index in range(1, num_norms + 1):
            self.add_module(f"norm{index}", nn.LayerNorm(dim))

    def feed_forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], the branch alone, without residual and norm."""
        return self.linear2(self.dropout(self.linear1(x).relu()))


def initialize_xavier(module: nn.Module) -> None:
    """Xavier-uniform weights for every matrix of a transformer, as in the official code."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
