"""Line charts of a report as SVG paths. Colours and fonts are in the style sheet."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from conddetr.engine.quality import RECALLS, THRESHOLDS, Quality

MAX_CLASS_LINES = 100
"""Lines of more classes would be a grey area."""
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Distances of ticks on the axis of thresholds."""
_MOST_TICKS = 5
_EVERY = 5
"""Every fifth threshold is plotted: 200 points on 364 units."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    style: str
    """Class name in the style sheet."""
    path: str
    """The attribute `d` of an SVG path."""


@dataclass(frozen=True)
class Chart:
    """Curves over [0, `x_max`] × [0, 1]."""

    width: ClassVar[int] = 430
    """Size of the SVG."""
    height: ClassVar[int] = 304
    left: ClassVar[int] = 46
    """Edges of the plotted area."""
    right: ClassVar[int] = 410
    top: ClassVar[int] = 24
    bottom: ClassVar[int] = 262
    x_label: str
    y_label: str
    lines: list[Line]
    x_max: float = 1.0
    x_step: float = 0.2
    """Distance of the ticks."""
    mark: tuple[float, float, str] | None = None
    """A point and its text."""

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Positions and texts."""
        values = [self.x_step * tick for tick in range(round(self.x_max / self.x_step) + 1)]
        return [(self.x(value), f"{value:g}") for value in values]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Positions and texts."""
        return [(self.y(share / 100), f"{share} %") for share in range(0, 101, 20)]

    def x(self, value: float) -> float:
        """Horizontal position of a value."""
        return round(self.left + (self.right - self.left) * value / self.x_max, 1)

    def y(self, value: float) -> float:
        """Vertical position of a value in [0, 1]."""
        return round(self.bottom - (self.bottom - self.top) * value, 1)


def recall_chart(quality: Quality) -> Chart:
    """Precision against recall: the mean of the classes at both IoU thresholds, and the classes with most objects."""
    by_objects = np.argsort(-quality.objects, kind="stable")[:MAX_CLASS_LINES]
    names = quality.overlaps.names
    lines = [
        Line(names[label], "each", _path(RECALLS, quality.precision[label], 1.0))
        for label in by_objects.tolist()
        if quality.objects[label]
    ]
    has_objects = quality.objects > 0
    if has_objects.any():
        means = (quality.strict_precision[has_objects].mean(0), quality.precision[has_objects].mean(0))
        lines.append(Line("mean of the classes, IoU 0.75", "strict", _path(RECALLS, means[0], 1.0)))
        lines.append(Line("mean of the classes, IoU 0.5", "main", _path(RECALLS, means[1], 1.0)))
    return Chart("recall", "precision", lines)


def threshold_chart(quality: Quality) -> Chart:
    """Precision, recall and F1 of all classes together against the score threshold; marks the best one."""
    curve, best = quality.curve, quality.best
    scores = quality.overlaps.scores
    # Scores after a short training are low: the axis ends at the first tick that no score exceeds.
    highest = float(scores[0]) if len(scores) else 1.0
    step = next((step for step in _STEPS if highest <= _MOST_TICKS * step), _STEPS[-1])
    x_max = step * max(1, math.ceil(highest / step))
    shown = THRESHOLDS[::_EVERY] <= x_max + 1e-6
    x = THRESHOLDS[::_EVERY][shown]
    columns = (
        ("precision", "precision", curve.precision),
        ("recall", "recall", curve.recall),
        ("F1", "main", curve.f1),
    )
    lines = [Line(name, style, _path(x, values[::_EVERY][shown], x_max)) for name, style, values in columns]
    mark = (best.threshold, best.f1, f"{best.threshold:.3f}") if best else None
    return Chart("score threshold", "", lines, x_max, step, mark)


def _path(x: np.ndarray, y: np.ndarray, x_max: float) -> str:
    """An SVG path; NaN leaves a gap."""
    chart, parts, starts = Chart("", "", [], x_max), [], True
    for across, up in zip(x.tolist(), y.tolist(), strict=True):
        if not math.isnan(up):
            parts.append(f"{'M' if starts else 'L'}{chart.x(across):g} {chart.y(up):g}")
        starts = math.isnan(up)
    return "".join(parts)
