"""Confusion matrix, and the kinds of errors of TIDE (Bolya et al., ECCV 2020)."""

from dataclasses import dataclass

import numpy as np

from conddetr.engine.quality.matching import Matching
from conddetr.engine.quality.overlaps import Overlaps

KINDS = ("wrong class", "bad location", "wrong class and bad location", "duplicate", "background", "missed")
"""TIDE's classification, localisation, both, duplicate, background and missed error."""
CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(KINDS))


@dataclass(frozen=True)
class Errors:
    """Wrong detections and objects without a detection at one score threshold."""

    wrong: np.ndarray
    """[E] int64, the wrong detections, best score first."""
    kinds: np.ndarray
    """[E] int64, index into `KINDS` of each."""
    nearest: np.ndarray
    """[E] int64, the object that explains each: the closest one of the class that its kind means; -1: none."""
    undetected: np.ndarray
    """[U] int64, objects without a right detection, crowds left out."""
    missed: np.ndarray
    """[U] bool: no wrong detection explains it (`wrong class` or `bad location`)."""

    def counts(self) -> dict[str, int]:
        """Number of errors of each of `KINDS`."""
        numbers = np.bincount(self.kinds, minlength=len(KINDS))
        numbers[MISSED] = self.missed.sum()
        return dict(zip(KINDS, numbers.tolist(), strict=True))


def confusion_matrix(overlaps: Overlaps, matching: Matching, threshold: float) -> np.ndarray:
    """Counts of objects and detections by true and detected class.

    Args:
        matching: with `same_class=False`.
        threshold: smallest score of a detection.

    Returns:
        [K + 1, K + 1] int64, rows: true class, columns: detected class; the last row has detections without an object,
        the last column objects without a detection. Row k sums to the objects of class k.
    """
    classes = len(overlaps.names)
    is_detected = _detected(overlaps, matching, threshold)
    real = ~overlaps.crowds
    columns = np.where(is_detected, overlaps.classes[matching.detection_of] if len(overlaps.classes) else -1, classes)
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    np.add.at(matrix, (overlaps.object_classes[real], columns[real]), 1)
    alone = _kept(overlaps, threshold) & ~matching.right & ~matching.ignored
    matrix[classes, :classes] = np.bincount(overlaps.classes[alone], minlength=classes)
    return matrix


def find_errors(overlaps: Overlaps, matching: Matching, iou: float, threshold: float) -> Errors:
    """Sort the errors into TIDE's kinds, in its order: location, class, duplicate, background, both.

    Args:
        matching: with `same_class=True`, at this IoU.
        iou: TIDE's foreground threshold; the background threshold is `LEAST_IOU`.
        threshold: smallest score of a detection.
    """
    is_real = ~overlaps.with_crowd
    same_object, same_iou = _closest(overlaps, is_real & overlaps.same_class)
    other_object, other_iou = _closest(overlaps, is_real & ~overlaps.same_class)
    # Pairs below TIDE's background threshold are absent; their IoU is 0 here.
    is_misplaced = (same_iou > 0) & (same_iou < iou)
    touches_nothing = (same_iou == 0) & (other_iou == 0)
    conditions = [is_misplaced, other_iou >= iou, same_iou >= iou, touches_nothing]
    kind_of = np.select(conditions, [LOCATION, CLASS, DUPLICATE, BACKGROUND], BOTH)
    nearest_of = np.where(np.isin(kind_of, (LOCATION, DUPLICATE)), same_object, other_object)
    wrong = np.flatnonzero(_kept(overlaps, threshold) & ~matching.right & ~matching.ignored)
    kinds, nearest = kind_of[wrong], nearest_of[wrong]
    undetected = np.flatnonzero(~overlaps.crowds & ~_detected(overlaps, matching, threshold))
    explained = nearest[np.isin(kinds, (LOCATION, CLASS))]
    return Errors(wrong, kinds, nearest, undetected, ~np.isin(undetected, explained))


def _closest(overlaps: Overlaps, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every detection, the object of its allowed pair with the highest IoU, -1 without one; and that IoU, or 0."""
    objects, ious = np.full(len(overlaps.scores), -1), np.zeros(len(overlaps.scores))
    # Pairs are sorted by IoU, so the first of each detection is the best.
    rows, first = np.unique(overlaps.pair_detections[allowed], return_index=True)
    objects[rows], ious[rows] = overlaps.pair_objects[allowed][first], overlaps.ious[allowed][first]
    return objects, ious


def _kept(overlaps: Overlaps, threshold: float) -> np.ndarray:
    """[N] bool, whether a detection has at least this score, compared in float32 as in `Detector.predict`."""
    return overlaps.scores >= np.float32(threshold)


def _detected(overlaps: Overlaps, matching: Matching, threshold: float) -> np.ndarray:
    """[M] bool, whether the object is assigned to a detection with at least this score."""
    kept = np.append(_kept(overlaps, threshold), False)
    return kept[matching.detection_of]
