"""Sigmoid logits and focal loss.

Source: Conditional DETR section 3.4; `SetCriterion` of the official code.
"""

import math

import torch
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.kernels import focal_loss
from conddetr.model.layers import MLP


def initialize_heads(class_embed: nn.Linear, bbox_embed: MLP) -> None:
    """Every class starts at probability 0.01 (focal prior), every box at its reference point."""
    nn.init.constant_(class_embed.bias, -math.log((1 - 0.01) / 0.01))
    nn.init.zeros_(bbox_embed.layers[-1].weight)
    nn.init.zeros_(bbox_embed.layers[-1].bias)


def class_loss(
    logits: Tensor, assignment: Tensor, labels: Tensor, class_weight: Tensor, config: ModelConfig, backend: str
) -> Tensor:
    """The focal loss; all classes have equal weight."""
    return focal_loss(logits, assignment, config.focal_alpha, config.focal_gamma, backend, labels=labels)


def divisor(normalizer: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of objects, for all losses."""
    # A scalar needs no cast to the losses' dtype.
    return normalizer[0]
