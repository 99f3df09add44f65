"""The page of a report: its numbers as rows for the template `page.html`, which escapes every text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from conddetr.engine.coco_metrics import CocoResult
from conddetr.engine.quality import KINDS, Quality
from conddetr.engine.tables import percent
from conddetr.viz.report.charts import MAX_CLASS_LINES, recall_chart, threshold_chart
from conddetr.viz.report.pictures import Picture

MAX_TABLE_CLASSES = 20
"""The confusion matrix of at most this many classes is a table with counts; a larger one is a picture."""
MAX_DRAWN_CLASSES = 100
"""The confusion matrix of more classes is not drawn, because it would be too fine to read."""
MAX_PAIRS = 20
"""Confused pairs of classes that are listed."""

_METRICS = {
    "AP": "average precision, mean over IoU thresholds from 0.5 to 0.95 and over the classes: the main metric",
    "AP50": "average precision at IoU 0.5: boxes may be loose",
    "AP75": "average precision at IoU 0.75: boxes must be tight",
    "APs": "AP of small objects, with an area below 32² pixels",
    "APm": "AP of medium objects, with an area from 32² to 96² pixels",
    "APl": "AP of large objects, with an area above 96² pixels",
    "AR1": "average recall, the share of objects found, mean as for AP, with one detection per image and class",
    "AR10": "average recall with ten detections per image and class",
    "AR100": "average recall with a hundred detections per image and class",
    "ARs": "AR100 of small objects",
    "ARm": "AR100 of medium objects",
    "ARl": "AR100 of large objects",
}
_KINDS = {
    "wrong class": "IoU of 0.5 or more with an object of another class",
    "bad location": "IoU from 0.1 to 0.5 with an object of its class",
    "wrong class and bad location": "IoU from 0.1 to 0.5 with an object of another class only",
    "duplicate": "its object already has a more confident detection",
    "background": "IoU below 0.1 with every object",
    "missed": "an object without a right detection that no error of class or location explains",
}


def render(
    result: CocoResult,
    quality: Quality,
    about: Mapping[str, str],
    wrong: list[Picture],
    missed: list[Picture],
) -> str:
    """The whole page as HTML.

    Args:
        result: COCO's metrics of the same detections.
        quality: the detections' quality in detail.
        about: name and text of further facts, such as the checkpoint.
        wrong, missed: pictures of errors.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = percent
    counts = quality.errors.counts()
    return environment.get_template("page.html").render(
        result=result,
        quality=quality,
        about=about,
        metrics=[(name, result.metrics[name], text) for name, text in _METRICS.items()],
        classes=_class_rows(result, quality),
        recall_chart=recall_chart(quality),
        threshold_chart=threshold_chart(quality),
        matrix=_matrix_rows(quality.confusion) if len(quality.objects) <= MAX_DRAWN_CLASSES else [],
        pairs=_confused_pairs(quality),
        kinds=[(name, counts[name], _KINDS[name]) for name in KINDS],
        most=max(1, *counts.values()),
        wrong=wrong,
        missed=missed,
        table_limit=MAX_TABLE_CLASSES,
        drawn_limit=MAX_DRAWN_CLASSES,
        line_limit=MAX_CLASS_LINES,
    )


def _class_rows(result: CocoResult, quality: Quality) -> list[dict[str, Any]]:
    """One row per class, best AP first."""
    rows = [
        {"name": row.name, "objects": row.objects, "ap": row.ap, "ap50": row.ap50, "best": best}
        for row, best in zip(result.per_class, quality.class_best, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["ap"])


def _matrix_rows(confusion: np.ndarray) -> list[list[tuple[int, float]]]:
    """Count of every cell, and its share of the row's sum."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    return [list(zip(*row, strict=True)) for row in zip(confusion.tolist(), shares.tolist(), strict=True)]


def _confused_pairs(quality: Quality) -> list[tuple[str, str, int, float]]:
    """True class, detected class, count, and share of the true class's objects; the most frequent pairs first."""
    counts = quality.confusion[:-1, :-1].copy()
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:MAX_PAIRS]
    names = quality.overlaps.names
    pairs = [divmod(int(cell), len(names)) for cell in order]
    return [
        (names[true], names[detected], int(counts[true, detected]), counts[true, detected] / quality.objects[true])
        for true, detected in pairs
        if counts[true, detected]
    ]
