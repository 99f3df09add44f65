"""Box overlap. torchvision has no batched pairwise GIoU without an epsilon, so it stands here."""

import torch
from torch import Tensor


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes, elementwise; insert dimensions to broadcast for a pairwise matrix.

    Args:
        a, b: [..., 4] xyxy with x1 ≥ x0 and y1 ≥ y0, floating.

    Returns:
        [...] in [-1, 1]. Finite also for boxes without area.

    Source: Rezatofighi et al., CVPR 2019.
    """
    tiny = torch.finfo(a.dtype).tiny
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).prod(-1)
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)
