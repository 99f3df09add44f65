"""L1 and generalised IoU loss of matched boxes."""

from conddetr.kernels.boxes.op import matched_box_loss
from conddetr.kernels.boxes.reference import generalized_iou

__all__ = ["generalized_iou", "matched_box_loss"]
