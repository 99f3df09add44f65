"""Bipartite matching of predictions and objects.

Source: DETR section 3.1; `models/matcher.py` of the official Conditional DETR (focal cost) and DETR.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from conddetr.config import ModelConfig
from conddetr.loss.boxes import generalized_iou


class NonFiniteCostError(ValueError):
    """The predictions or the boxes hold NaN or infinity, so there is no assignment of least cost."""


def pad_targets(targets: list[dict], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pack the objects of a batch into two tensors, in one copy each.

    Returns:
        labels [B, N] int64 and boxes [B, N, 4] float32 cxcywh, N the largest count; padding is class 0 and
        an empty box.
    """
    labels = torch.nn.utils.rnn.pad_sequence([target["labels"] for target in targets], batch_first=True)
    boxes = torch.nn.utils.rnn.pad_sequence(
        [target["boxes"].reshape(-1, 4).to(torch.float32) for target in targets], batch_first=True
    )
    return labels.to(device), boxes.to(device)


def focal_cost(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Cost of assigning each class, from the focal loss: [..., Q, K], [..., N] -> [..., Q, N].

    log(p + 1e-8), as the official code has it, is taken as logaddexp(log p, log 1e-8): equal, and finite
    for every finite logit.
    """
    logits = _gather_classes(logits, labels)
    floor = logits.new_tensor(math.log(1e-8))
    p = logits.sigmoid()
    positive = alpha * (1 - p) ** gamma * -torch.logaddexp(F.logsigmoid(logits), floor)
    negative = (1 - alpha) * p**gamma * -torch.logaddexp(F.logsigmoid(-logits), floor)
    return positive - negative


def softmax_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of each class: [..., Q, K], [..., N] -> [..., Q, N]."""
    return -_gather_classes(logits.softmax(-1), labels)


def _gather_classes(values: Tensor, labels: Tensor) -> Tensor:
    index = labels.unsqueeze(-2).expand(*values.shape[:-1], labels.shape[-1])
    return values.gather(-1, index)


@torch.no_grad()
def matching_cost(logits: Tensor, boxes: Tensor, labels: Tensor, objects: Tensor, config: ModelConfig) -> Tensor:
    """Cost of every prediction for every object of its own image, in float32 (float64 stays).

    Args:
        logits: [L, B, Q, K]; boxes: [L, B, Q, 4] cxcywh; labels: [B, N]; objects: [B, N, 4] cxcywh.

    Returns:
        [L, B, Q, N].
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, boxes, objects = logits.to(dtype), boxes.to(dtype), objects.to(dtype)
    labels = labels.expand(len(logits), -1, -1)
    if config.family == "detr":
        class_cost = softmax_cost(logits, labels)
    else:
        class_cost = focal_cost(logits, labels, config.focal_alpha, config.focal_gamma)
    boxes, objects = boxes.unsqueeze(-2), objects.unsqueeze(-3)
    bbox_cost = (boxes - objects).abs().sum(-1)
    giou = generalized_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(objects, "cxcywh", "xyxy"))
    return config.bbox_cost * bbox_cost + config.class_cost * class_cost - config.giou_cost * giou


def match(logits: Tensor, boxes: Tensor, targets: list[dict], config: ModelConfig) -> list[list[tuple[Tensor, Tensor]]]:
    """The assignment of least total cost, per layer and image (scipy's `linear_sum_assignment`).

    All layers' costs travel to the host in one copy.

    Args:
        logits: [L, B, Q, K]; boxes: [L, B, Q, 4] cxcywh in [0, 1].
        targets: per image `labels` [n] int64 and `boxes` [n, 4] cxcywh.

    Returns:
        `indices[layer][image]`: (query indices, object indices), int64 on the CPU, min(Q, n) pairs, sorted by
        query.

    Raises:
        NonFiniteCostError: a cost is not finite; names the layer and the image.
    """
    from scipy.optimize import linear_sum_assignment

    labels, objects = pad_targets(targets, logits.device)
    costs = matching_cost(logits, boxes, labels, objects, config).cpu()
    counts = [len(target["labels"]) for target in targets]
    indices = []
    for layer, layer_costs in enumerate(costs):
        matched = []
        for image, (cost, count) in enumerate(zip(layer_costs.numpy(), counts, strict=True)):
            try:
                pair = linear_sum_assignment(cost[:, :count])
            except ValueError as error:
                raise NonFiniteCostError(
                    f"Matching decoder layer {layer}, image {image} of the batch: the cost is not finite. "
                    f"The predictions (or the boxes of the targets) hold NaN or infinity."
                ) from error
            matched.append(tuple(torch.as_tensor(index, dtype=torch.int64) for index in pair))
        indices.append(matched)
    return indices
