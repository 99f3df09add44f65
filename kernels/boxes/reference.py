"""Box losses in plain PyTorch: the truth that every kernel is held to.

torchvision has no broadcasting GIoU without an epsilon, so it stands here.
"""

import torch
from torch import Tensor
from torchvision.ops import box_convert


def area_ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; where the whole is no area, 0 and without gradient: 1/0 has no place in either."""
    tiny = torch.finfo(whole.dtype).tiny
    return torch.where(whole < tiny, 0.0, part / whole.clamp(min=tiny))


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes, elementwise; insert dimensions to broadcast for a pairwise matrix.

    Args:
        a, b: [..., 4] xyxy with x1 ≥ x0 and y1 ≥ y0, floating.

    Returns:
        [...] in [-1, 1]. Finite, like its gradient, also for boxes without area.

    Source: Rezatofighi et al., CVPR 2019.
    """
    # By coordinate: products over a last dimension of two are slow, forward and more so backward.
    ax0, ay0, ax1, ay1 = a.unbind(-1)
    bx0, by0, bx1, by1 = b.unbind(-1)
    # Not `clamp`, whose gradient at 0 is not the same in all versions of PyTorch: boxes that just touch have none.
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).relu()
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).relu()
    intersection = width * height
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    hull_width = torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)
    hull = hull_width * (torch.maximum(ay1, by1) - torch.minimum(ay0, by0))
    return area_ratio(intersection, union) - area_ratio(hull - union, hull)


def matched_box_loss(boxes: Tensor, objects: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
    """boxes [L, B, Q, 4], objects [B, N, 4], assignment [L, B, Q] -> [L] and [L]; see `op.py`."""
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    layer, image, query = matched = (assignment >= 0).nonzero(as_tuple=True)
    predicted = boxes[layer, image, query].to(dtype)
    wanted = objects[image, assignment[matched]].to(dtype)
    giou = generalized_iou(box_convert(predicted, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
    per_query = boxes.new_zeros((2, *assignment.shape), dtype=dtype)
    losses = torch.stack([(predicted - wanted).abs().sum(-1), 1 - giou])
    # Not `index_add`: its order is not fixed on a GPU.
    per_query[:, layer, image, query] = losses
    l1, overlap = per_query.flatten(2).sum(2)
    return l1, overlap
