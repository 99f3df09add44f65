"""Everything that a report on quality shows, from detections and ground truth."""

from dataclasses import dataclass

import numpy as np

from conddetr.engine.coco_metrics import Detections
from conddetr.engine.quality.curves import OperatingPoint, ThresholdCurve, precision_at_recalls, threshold_curve
from conddetr.engine.quality.errors import Errors, confusion_matrix, find_errors
from conddetr.engine.quality.matching import Matching, match
from conddetr.engine.quality.overlaps import Overlaps, find_overlaps

IOU = 0.5
"""Smallest IoU of a right detection, except in the precision-recall curve at 0.75."""
STRICT_IOU = 0.75
DEFAULT_THRESHOLD = 0.5
"""Score threshold of confusion matrix and errors if no threshold is best; the default of `Detector.predict`."""


@dataclass(frozen=True)
class Quality:
    """Curves, best thresholds, confusion matrix and errors of a detector on annotated images."""

    overlaps: Overlaps
    objects: np.ndarray
    """[K] int64, objects of each class, crowds not counted."""
    precision: np.ndarray
    """[K, 101] float64, COCO's precision at `RECALLS` with IoU 0.5; NaN for a class without objects. The mean over
    recalls is the class's AP50."""
    strict_precision: np.ndarray
    """[K, 101] float64, the same with IoU 0.75."""
    curve: ThresholdCurve
    """Detections of all classes together."""
    best: OperatingPoint | None
    """The threshold with the highest F1 of `curve`; see `ThresholdCurve.best`."""
    class_best: list[OperatingPoint | None]
    """The same of each class."""
    threshold: float
    """Score threshold of `confusion` and `errors`: the best one, or `DEFAULT_THRESHOLD` if there is none."""
    confusion: np.ndarray
    """[K + 1, K + 1] int64; see `confusion_matrix`."""
    errors: Errors


def measure_quality(ground_truth: dict, detections: Detections, source: str = "annotations") -> Quality:
    """Compare detections with annotations.

    A detection is right if it has an IoU of at least 0.5 with a free object of its class; by descending score, each
    takes the free object with the highest IoU, as in COCO's metrics. Detections without an object that lie in a crowd
    of their class (by half or more) are neither right nor wrong.

    Args:
        ground_truth: in COCO's format, with `iscrowd`.
        detections: detections in its images, in any order.
        source: origin of the annotations, for errors.

    Raises:
        ValueError: a detection belongs to another image.
        ModuleNotFoundError: no library for COCO's metrics is installed.
    """
    overlaps = find_overlaps(ground_truth, detections, source)
    matching = match(overlaps, IOU)
    curve = _curve(overlaps, matching, np.ones(len(overlaps.scores), bool), np.ones(len(overlaps.crowds), bool))
    best = curve.best()
    class_best = [
        _curve(overlaps, matching, overlaps.classes == label, overlaps.object_classes == label).best()
        for label in range(len(overlaps.names))
    ]
    threshold = DEFAULT_THRESHOLD if best is None else best.threshold
    return Quality(
        overlaps,
        overlaps.objects_per_class(),
        _class_precision(overlaps, matching),
        _class_precision(overlaps, match(overlaps, STRICT_IOU)),
        curve,
        best,
        class_best,
        threshold,
        confusion_matrix(overlaps, match(overlaps, IOU, same_class=False), threshold),
        find_errors(overlaps, matching, IOU, threshold),
    )


def _curve(overlaps: Overlaps, matching: Matching, rows: np.ndarray, objects: np.ndarray) -> ThresholdCurve:
    """The curve of some detections, [N] bool, and objects, [M] bool."""
    rows = rows & ~matching.ignored
    return threshold_curve(overlaps.scores[rows], matching.right[rows], int((objects & ~overlaps.crowds).sum()))


def _class_precision(overlaps: Overlaps, matching: Matching) -> np.ndarray:
    """[K, 101] float64, `precision_at_recalls` of each class."""
    objects = overlaps.objects_per_class().tolist()
    curves = [
        precision_at_recalls(matching.right[(overlaps.classes == label) & ~matching.ignored], count)
        for label, count in enumerate(objects)
    ]
    return np.array(curves).reshape(len(objects), -1)
