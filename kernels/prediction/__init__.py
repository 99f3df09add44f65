"""Boxes from offsets and reference points."""

from conddetr.kernels.prediction.op import predicted_boxes
from conddetr.kernels.prediction.reference import inverse_sigmoid

__all__ = ["inverse_sigmoid", "predicted_boxes"]
