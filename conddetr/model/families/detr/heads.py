"""Softmax logits with a no-object class, and cross-entropy.

Source: DETR section 3.1; `SetCriterion` of the official code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.kernels.focal import matched_classes
from conddetr.model.layers import MLP


def initialize_heads(class_embed: nn.Linear, bbox_embed: MLP) -> None:
    """Keep PyTorch's initial values."""


def class_loss(
    logits: Tensor, assignment: Tensor, labels: Tensor, class_weight: Tensor, config: ModelConfig, backend: str
) -> Tensor:
    """The weighted cross-entropy, in plain PyTorch; the target of unmatched queries is the last class."""
    classes = matched_classes(assignment, labels)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = torch.where(classes < 0, logits.shape[-1] - 1, classes)
    weight = class_weight.to(logits.dtype)
    loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), weight, reduction="none")
    return loss.view(len(logits), -1).sum(1)


def divisor(normalizer: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the class weights for the cross-entropy, the number of objects for both box losses."""
    num_boxes, class_weights = normalizer.to(dtype)
    return torch.stack([class_weights, num_boxes, num_boxes]).unsqueeze(1)
