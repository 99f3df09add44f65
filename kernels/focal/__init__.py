"""Sigmoid focal loss, summed over everything but the first dimension."""

from conddetr.kernels.focal.op import focal_loss
from conddetr.kernels.focal.reference import matched_classes

__all__ = ["focal_loss", "matched_classes"]
