"""Assignment of detections to objects."""

from dataclasses import dataclass

import numpy as np

from conddetr.engine.quality.overlaps import Overlaps

_HIGHEST_IOU = 1 - 1e-10
"""COCO's bound, so that rounding does not make a perfect box miss an IoU threshold of 1."""


@dataclass(frozen=True)
class Matching:
    """The object of every detection and the detection of every object."""

    object_of: np.ndarray
    """[N] int64, index of the object; -1: none."""
    detection_of: np.ndarray
    """[M] int64, index of the detection; -1: none."""
    ignored: np.ndarray
    """[N] bool: no object, but a crowd of its class. Such a detection is neither right nor wrong."""

    @property
    def right(self) -> np.ndarray:
        """[N] bool, whether a detection has an object."""
        return self.object_of >= 0


def match(overlaps: Overlaps, iou: float, same_class: bool = True) -> Matching:
    """Assign detections to objects greedily: by descending score, each takes the free object with the highest IoU.

    Detections below a score threshold never change the assignment of those above it, so one call serves all thresholds.

    Args:
        iou: smallest IoU of a detection with its object.
        same_class: only objects of the detection's class, as in COCO's metrics (`COCOeval.evaluateImg`). Otherwise
            objects of any class, as FiftyOne's `evaluate_detections(classwise=False)` does for confusion matrices.
            Crowds count only for detections of their class in both cases.
    """
    reaches = overlaps.ious >= min(iou, _HIGHEST_IOU)
    allowed = reaches & ~overlaps.with_crowd & (overlaps.same_class | (not same_class))
    object_of, detection_of = [-1] * len(overlaps.scores), [-1] * len(overlaps.crowds)
    pairs = overlaps.pair_detections[allowed].tolist(), overlaps.pair_objects[allowed].tolist()
    for detection, target in zip(*pairs, strict=True):
        if object_of[detection] < 0 and detection_of[target] < 0:
            object_of[detection], detection_of[target] = target, detection
    ignored = np.zeros(len(object_of), bool)
    ignored[overlaps.pair_detections[reaches & overlaps.with_crowd & overlaps.same_class]] = True
    objects = np.array(object_of, np.int64)
    return Matching(objects, np.array(detection_of, np.int64), ignored & (objects < 0))
