"""Matching cost in plain PyTorch: the reference for every kernel.

Source: DETR section 3.1; `models/matcher.py` of the official Conditional DETR (focal cost) and DETR (softmax cost).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from conddetr.kernels.boxes.reference import corners, generalized_iou


def focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Cost of assigning a class, from the focal loss, elementwise.

    The official code's log(p + 1e-8) is computed as logaddexp(log p, log 1e-8), which is equal, and finite for every
    finite logit.
    """
    floor = logits.new_tensor(math.log(1e-8))
    p = logits.sigmoid()
    positive = alpha * (1 - p) ** gamma * -torch.logaddexp(F.logsigmoid(logits), floor)
    negative = (1 - alpha) * p**gamma * -torch.logaddexp(F.logsigmoid(-logits), floor)
    return positive - negative


def class_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each object's class: [L, B, Q, K], [B, N] -> [L, B, N, Q]."""
    index = labels.unsqueeze(-2).expand(*logits.shape[:-1], labels.shape[-1])
    return logits.gather(-1, index).transpose(-1, -2)


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    objects: Tensor,
    counts: Tensor,
    log_total: Tensor | None,
    weights: tuple[float, float, float],
    alpha: float,
    gamma: float,
) -> Tensor:
    """[L, B, N, Q]; see `op.py`. log_total [L, B, Q] of the softmax, None: focal; weights of class, L1, GIoU."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    picked = class_logits(logits, labels).to(dtype)
    if log_total is None:
        cost = focal_cost(picked, alpha, gamma)
    else:
        cost = -(picked - log_total.to(dtype).unsqueeze(-2)).exp()
    boxes, objects = boxes.to(dtype).unsqueeze(-3), objects.to(dtype).unsqueeze(-2)
    bbox_cost = sum((a - b).abs() for a, b in zip(boxes.unbind(-1), objects.unbind(-1), strict=True))
    giou = generalized_iou(corners(boxes), corners(objects))
    cost = (weights[0] * cost + weights[1] * bbox_cost - weights[2] * giou).clamp(max=torch.finfo(dtype).max)
    is_padding = torch.arange(labels.shape[1], device=counts.device) >= counts[:, None]
    return cost.masked_fill(is_padding[:, :, None], 0.0).contiguous()
