"""Recipes of a step's weights, and their preparation one by one in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from conddetr.kernels.common.launch import REPLICAS


class FrozenNorm(NamedTuple):
    """A batch norm with fixed statistics, x · scale + shift per channel: four [C] tensors and epsilon."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    eps: float

    def scale(self) -> Tensor:
        """[C], float32 or wider: weight / √(variance + eps)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.to(dtype) * (self.variance.to(dtype) + self.eps).rsqrt()

    def shift(self) -> Tensor:
        """[C], float32 or wider: bias - mean · scale."""
        scale = self.scale()
        return self.bias.to(scale.dtype) - self.mean.to(scale.dtype) * scale


class Weight(NamedTuple):
    """Parameters concatenated along the first dimension; convolutions are returned in channels-last."""

    parts: tuple[Tensor, ...]
    """[O, I] or [O], equal except for the first dimension, or one convolution [O, I, kh, kw]."""
    norm: FrozenNorm | None = None
    """For a convolution: the frozen norm behind it, whose scale is folded into the weight."""
    rows: tuple[int, int] | None = None
    """Only these rows of one part, from the first up to the second; other recipes may use the rest."""
    copies: int | None = None
    """For vectors: this many equal rows of [ΣO], as [copies, ΣO]. If row i is added to row i of a matrix, its gradient
    is the matrix's gradient, and no kernel has to sum the rows."""


class Shift(NamedTuple):
    """The shift of a frozen norm: the bias of the convolution into which its scale is folded."""

    norm: FrozenNorm


class Replicas(NamedTuple):
    """A vector [C] as [`REPLICAS`, C], all rows equal, in its own dtype: a kernel with at most this many programs
    stores the sums of program i as the gradient of row i, and needs no second kernel to add them.
    """

    vector: Tensor


Recipe = Weight | Shift | Replicas


def prepare_weights(recipes: list[Recipe], dtype: torch.dtype) -> list[Tensor]:
    """See `op.prepare_weights`."""
    return [_prepare(recipe, dtype) for recipe in recipes]


def _prepare(recipe: Recipe, dtype: torch.dtype) -> Tensor:
    if isinstance(recipe, Replicas):
        return recipe.vector.expand(REPLICAS, -1)
    if isinstance(recipe, Shift):
        return recipe.norm.shift().to(dtype)
    weight = torch.cat(recipe.parts) if len(recipe.parts) > 1 else recipe.parts[0]
    if recipe.rows is not None:
        weight = weight[slice(*recipe.rows)]
    if recipe.norm is not None:
        weight = weight * recipe.norm.scale()[:, None, None, None]
    weight = weight.to(dtype)
    if recipe.copies is not None:
        return weight.expand(recipe.copies, -1)
    return weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight
