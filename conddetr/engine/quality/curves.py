"""Precision against recall, and precision, recall and F1 against the score threshold."""

from dataclasses import dataclass

import numpy as np

RECALLS = np.linspace(0, 1, 101)
"""The recalls at which COCO reads precision."""
THRESHOLDS = (np.arange(1001) / 1000).astype(np.float32)
"""Score thresholds of `ThresholdCurve`. In steps of 0.001, so that a printed threshold is exact; float32, as scores are
compared in `Detector.predict`."""


@dataclass(frozen=True)
class OperatingPoint:
    """Quality at one score threshold; detections with at least this score count."""

    threshold: float
    precision: float
    """Share of right detections among the detections."""
    recall: float
    """Share of objects with a right detection."""
    f1: float
    """Harmonic mean of precision and recall."""


@dataclass(frozen=True)
class ThresholdCurve:
    """Counts of detections at each of `THRESHOLDS`."""

    kept: np.ndarray
    """[1001] int64, detections with at least this score."""
    right: np.ndarray
    """[1001] int64, those that match an object."""
    objects: int
    """Objects to detect, crowds not counted."""

    @property
    def precision(self) -> np.ndarray:
        """[1001] float64; NaN where no detection has that score."""
        return _ratio(self.right, self.kept)

    @property
    def recall(self) -> np.ndarray:
        """[1001] float64; NaN without objects."""
        return _ratio(self.right, np.full_like(self.kept, self.objects))

    @property
    def f1(self) -> np.ndarray:
        """[1001] float64: 2 · right / (detections + objects), which is 2PR / (P + R); NaN without objects."""
        return _ratio(2 * self.right, self.kept + self.objects) if self.objects else np.full(len(self.kept), np.nan)

    def best(self) -> OperatingPoint | None:
        """The threshold with the highest F1; the middle one if several have it. None without objects, and if no
        detection is right at any threshold.
        """
        if not self.right.any() or not self.objects:
            return None
        f1 = self.f1
        highest = np.flatnonzero(f1 == f1.max())
        return self.at(int(highest[len(highest) // 2]))

    def at(self, position: int) -> OperatingPoint:
        """Quality at a position in `THRESHOLDS`."""
        values = (self.precision[position], self.recall[position], self.f1[position])
        return OperatingPoint(position / 1000, *map(float, values))


def threshold_curve(scores: np.ndarray, right: np.ndarray, objects: int) -> ThresholdCurve:
    """Count detections over the score threshold.

    Args:
        scores: [n], descending.
        right: [n] bool, whether each detection matches an object.
        objects: number of objects to detect.
    """
    ascending = scores[::-1]
    kept = len(scores) - np.searchsorted(ascending, THRESHOLDS, side="left")
    total = np.concatenate([[0], np.cumsum(right)])
    return ThresholdCurve(kept, total[kept], objects)


def precision_at_recalls(right: np.ndarray, objects: int) -> np.ndarray:
    """COCO's interpolated precision (`COCOeval.accumulate`): the highest precision at this recall or a higher one.

    Args:
        right: [n] bool by descending score, whether each detection matches an object.
        objects: number of objects to detect.

    Returns:
        [101] float64, at `RECALLS`; 0 at recalls that are not reached, NaN without objects. The mean is COCO's AP.
    """
    if objects == 0:
        return np.full(len(RECALLS), np.nan)
    matched = np.cumsum(right)
    precision = matched / np.arange(1, len(right) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    position = np.searchsorted(matched / objects, RECALLS, side="left")
    return np.append(highest, 0.0)[position]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; NaN where `whole` is 0."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
