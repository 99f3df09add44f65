"""What a step computes with, made of the parameters one after the other in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from conddetr.kernels.common.launch import REPLICAS


class FrozenNorm(NamedTuple):
    """A batch norm with fixed statistics: x · scale + shift per channel; four [C] tensors and a number."""

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
    """Parameters, one below the other along the first dimension; convolutions come out in channels-last."""

    parts: tuple[Tensor, ...]
    """Of one shape but for the first dimension: [O, I], [O], or one convolution [O, I, kh, kw]."""
    norm: FrozenNorm | None = None
    """Of a convolution: the frozen norm behind it, whose scale the weight takes along."""
    rows: tuple[int, int] | None = None
    """Only these rows of one part, from the first up to the second; others may take the rest."""
    copies: int | None = None
    """Of vectors: so many of [ΣO] as [copies, ΣO], all equal: whoever adds row i to row i of a matrix hands on the
    matrix's gradient as it is, and needs no kernel that adds its rows up."""


class Shift(NamedTuple):
    """What a frozen norm adds: the bias of the convolution that took its scale."""

    norm: FrozenNorm


class Replicas(NamedTuple):
    """A vector [C] as [`REPLICAS`, C], all rows equal, in its own dtype: a kernel of at most so many programs gives
    the gradient of row i as the sums of program i, and needs no second kernel that adds them up.
    """

    vector: Tensor


Recipe = Weight | Shift | Replicas


def prepare_weights(recipes: list[Recipe], dtype: torch.dtype) -> list[Tensor]:
    """As `op.prepare_weights`."""
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
