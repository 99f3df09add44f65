"""Sigmoid focal loss, summed over everything but the first dimension."""

from conddetr.kernels.focal.op import focal_loss

__all__ = ["focal_loss"]
