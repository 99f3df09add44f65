"""The quality of a detector in detail: curves, best score thresholds, confusion matrix and kinds of errors."""

from conddetr.engine.quality.curves import RECALLS, THRESHOLDS, OperatingPoint, ThresholdCurve
from conddetr.engine.quality.errors import KINDS, Errors
from conddetr.engine.quality.measure import IOU, STRICT_IOU, Quality, measure_quality
from conddetr.engine.quality.overlaps import Overlaps

__all__ = [
    "IOU",
    "KINDS",
    "RECALLS",
    "STRICT_IOU",
    "THRESHOLDS",
    "Errors",
    "OperatingPoint",
    "Overlaps",
    "Quality",
    "ThresholdCurve",
    "measure_quality",
]
