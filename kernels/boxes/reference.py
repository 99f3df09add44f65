"""Box losses in plain PyTorch: the reference for every kernel.

torchvision has no broadcasting GIoU without an epsilon, so this module has one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from conddetr.kernels import registry

SMALL = 1e-19
"""Lengths below it, and areas below this fraction of the hull's, count as zero: gradients contain the inverse of
lengths and of their products."""


def corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) -> a quarter of (x0, y0, x1, y1), [..., 4]: exact, and finite for every finite box."""
    return box_convert(0.25 * boxes, "cxcywh", "xyxy")


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes, elementwise; insert dimensions to broadcast for a pairwise matrix.

    Args:
        a, b: [..., 4] xyxy with x1 ≥ x0 and y1 ≥ y0, floating.

    Returns:
        [...] in [-1, 1]. It and its gradient are finite if the boxes' differences are, also for boxes without area.

    Source: Rezatofighi et al., CVPR 2019.
    """
    # By coordinate: products over a last dimension of two are slow, even more in backward.
    ax0, ay0, ax1, ay1 = a.unbind(-1)
    bx0, by0, bx1, by1 = b.unbind(-1)
    hull_width = torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)
    hull_height = torch.maximum(ay1, by1) - torch.minimum(ay0, by0)
    is_area = (hull_width >= SMALL) & (hull_height >= SMALL)
    # In units of the hull, so that no product overflows.
    hull_width, hull_height = (torch.where(is_area, x, 1.0) for x in (hull_width, hull_height))
    # Not `clamp`, whose gradient at 0 depends on PyTorch's version: boxes that just touch have none here.
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).relu() / hull_width
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).relu() / hull_height
    intersection = width * height
    area_a = (ax1 - ax0) / hull_width * ((ay1 - ay0) / hull_height)
    area_b = (bx1 - bx0) / hull_width * ((by1 - by0) / hull_height)
    union = area_a + area_b - intersection
    iou = torch.where(union < SMALL, 0.0, intersection / union.clamp(min=SMALL))
    return torch.where(is_area, iou + union - 1, 0.0)


def matched_box_loss(boxes: Tensor, objects: Tensor, assignment: Tensor) -> Tensor:
    """boxes [L, B, Q, 4], objects [B, N, 4], assignment [L, B, Q] -> [2, L]; see `op.py`."""
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    if registry.transforms():
        per_query = _losses_of_all(boxes.to(dtype), objects.to(dtype), assignment)
    else:
        layer, image, query = matched = (assignment >= 0).nonzero(as_tuple=True)
        per_query = boxes.new_zeros((2, *assignment.shape), dtype=dtype)
        # Not `index_add`: its order is not fixed on a GPU.
        per_query[:, layer, image, query] = pair_losses(
            boxes[layer, image, query].to(dtype), objects[image, assignment[matched]].to(dtype)
        )
    return per_query.flatten(2).sum(2)


def pair_losses(predicted: Tensor, wanted: Tensor) -> Tensor:
    """[..., 4] and [..., 4] cxcywh -> [2, ...]: |a - b| summed over coordinates, and 1 - GIoU(a, b)."""
    giou = generalized_iou(corners(predicted), corners(wanted))
    return torch.stack([(predicted - wanted).abs().sum(-1), 1 - giou])


def _losses_of_all(boxes: Tensor, objects: Tensor, assignment: Tensor) -> Tensor:
    """Losses of every query, zero if it has no object: [2, L, B, Q]. For vmap, where no size may depend on values."""
    is_matched = (assignment >= 0).unsqueeze(-1)
    # An extra object for the unmatched queries.
    index = torch.where(is_matched, assignment.unsqueeze(-1), objects.shape[1]).expand_as(boxes)
    targets = F.pad(objects, (0, 0, 0, 1)).expand(len(boxes), -1, -1, -1).gather(2, index)
    return torch.where(is_matched.squeeze(-1), pair_losses(torch.where(is_matched, boxes, targets), targets), 0.0)
