"""Small pieces that several parts of the model share."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.kernels import dropout_add, registry, relu_dropout
from conddetr.kernels.registry import OPERATIONS


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
    """Base of the transformer layers: residual branches with dropout and post-norm, and the FFN.

    It is a base class, not a submodule, because its attributes have the official names.
    """

    def __init__(self, config: ModelConfig, backend: str, num_norms: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_dim, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, config.hidden_dim)
        self.dropout = config.dropout
        self.backend = backend
        for index in range(1, num_norms + 1):
            self.add_module(f"norm{index}", nn.LayerNorm(config.hidden_dim))

    def feed_forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]: the branch alone, without residual and norm."""
        return self.linear2(relu_dropout(self.linear1(x), *self._dropout(x)))

    def add(self, tokens: Tensor, branch: Tensor) -> Tensor:
        """The residual add tokens + dropout(branch); both [..., dim]."""
        return dropout_add(branch, tokens, *self._dropout(tokens))

    def _dropout(self, tokens: Tensor) -> tuple[float, str]:
        """Probability and backend: on GPUs PyTorch's dropout is already one kernel."""
        choice = OPERATIONS["dropout_add"].prefer(self.backend, tokens.device, tokens.dtype)
        return self.dropout if self.training else 0.0, choice.backend


def channels_last(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[B, C, H, W] stored as [B, H, W, C], except inside `torch.func.vmap`, which has no such layout.

    Args:
        x: any layout.
        dtype: of the result; default: of x. One copy changes both.
    """
    if registry.transforms():
        return x if dtype is None else x.to(dtype)
    if dtype is None or dtype == x.dtype:
        return x.contiguous(memory_format=torch.channels_last)
    return x.to(dtype=dtype, memory_format=torch.channels_last)


def initialize_xavier(module: nn.Module) -> None:
    """Xavier-uniform weights for every matrix of a transformer, as in the official code."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
