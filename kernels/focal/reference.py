"""Focal loss in plain PyTorch: the reference for every kernel.

Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5; `sigmoid_focal_loss` of the official
Conditional DETR, before its division by the number of boxes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def class_weights(alpha: float) -> tuple[float, float]:
    """Weights of the present class and of absent ones; a negative alpha turns them off."""
    return (1.0, 1.0) if alpha < 0 else (alpha, 1.0 - alpha)


def modulated_loss(logits: Tensor, gamma: float) -> Tensor:
    """σ(x)^γ · log(1 + e^x), elementwise: the loss of an absent class; for a present class, pass -x."""
    # Beyond the bound σ rounds to 0 or 1 and its gradient is 0; the clamp keeps it 0 in the product with the loss.
    bound = -math.log(torch.finfo(logits.dtype).tiny)
    # The default threshold of 20 is too coarse for float64.
    return logits.clamp(-bound, bound).sigmoid() ** gamma * F.softplus(logits, threshold=40)


def matched_classes(assignment: Tensor, labels: Tensor) -> Tensor:
    """Class of the object that each query is matched with, -1 for none: [L, B, Q] and labels [B, N] -> [L, B, Q]."""
    if labels.shape[1] == 0:
        return assignment
    classes = labels.expand(len(assignment), -1, -1).gather(2, assignment.clamp(min=0))
    return torch.where(assignment < 0, assignment, classes)


def focal_loss(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """logits [L, ..., K] and target [L, ...] -> [L]; see `op.py`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    present, absent = class_weights(alpha)
    # The loss of every class as if absent, except the target's: cheaper than a one-hot tensor in every term.
    index = target.clamp(min=0).unsqueeze(-1)
    x, is_present = logits.gather(-1, index), index == target.unsqueeze(-1)
    # Not in place, because vmap does not support that; it takes no longer.
    negatives = modulated_loss(logits, gamma).scatter(-1, index, torch.where(is_present, 0.0, modulated_loss(x, gamma)))
    positives = torch.where(is_present, modulated_loss(-x, gamma), 0.0)
    return absent * negatives.flatten(1).sum(1) + present * positives.flatten(1).sum(1)
