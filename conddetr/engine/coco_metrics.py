"""Detections in COCO's format, and their COCO metrics, computed by faster-coco-eval or pycocotools."""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conddetr.files import atomic_file
from conddetr.garbage import collection_paused

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of COCO's twelve metrics, in pycocotools' order; each in [0, 1], or -1 if it is undefined because no object
counts."""
_AREAS = {"s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, math.inf)}
"""COCO's ranges of object areas, in square pixels, by the letter at the end of a metric's name."""

LIBRARIES = ("faster_coco_eval", "pycocotools")
"""Libraries that compute the metrics, fastest first. Their results are the same."""

WRITTEN_AT_ONCE = 10_000
"""Detections that are converted to dicts and text at a time when a file is written."""


@dataclass
class Detections:
    """N detections of many images in four arrays: 36 bytes each, where a list of dicts takes 600."""

    image_ids: np.ndarray
    """[N] int64."""
    category_ids: np.ndarray
    """[N] int64."""
    boxes: np.ndarray
    """[N, 4] float32, xywh in pixels of the original image."""
    scores: np.ndarray
    """[N] float32 in [0, 1]."""

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def join(cls, parts: "Iterable[Detections]") -> "Detections":
        """The detections of all parts, sorted by image id; the order within an image is kept."""
        empty = cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 4), np.float32), np.empty(0, np.float32))
        rows = [vars(part).values() for part in (empty, *parts)]
        columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        return cls(*(column[order] for column in columns))

    def to_coco(self) -> list[dict]:
        """A list in COCO's results format."""
        columns = (self.image_ids.tolist(), self.category_ids.tolist(), self.boxes.tolist(), self.scores.tolist())
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for image_id, category_id, box, score in zip(*columns, strict=True)
        ]

    def write(self, path: str | Path) -> None:
        """Write COCO's results JSON, whole or not at all. It is written in parts, which need little memory besides the
        arrays.
        """
        with atomic_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
            file.write("[")
            for first in range(0, len(self), WRITTEN_AT_ONCE):
                part = Detections(*(column[first : first + WRITTEN_AT_ONCE] for column in vars(self).values()))
                # Without the brackets of this part's list.
                file.write((", " if first else "") + json.dumps(part.to_coco())[1:-1])
            file.write("]")


@dataclass
class ClassMetrics:
    """One class; each metric in [0, 1], or -1 for a class without objects."""

    name: str
    objects: int
    """Annotated boxes, crowds not counted."""
    ap: float
    ap50: float
    ap75: float
    ar100: float


@dataclass
class CocoResult:
    """Result of an evaluation."""

    metrics: dict[str, float]
    """COCO's twelve metrics by the names in `METRICS`."""
    per_class: list[ClassMetrics]
    """In the order of the ground truth's categories."""
    source: str
    """The data that was evaluated: an annotation file, with the number of its images if not all were used."""
    images: int
    objects: int
    """Annotated boxes, crowds not counted."""
    library: str
    """The library that computed the metrics, with its version."""

    def describe(self) -> str:
        """The evaluated data and the library, in one line."""
        return f"{self.source}: {self.images} images, {self.objects} objects; by {self.library}"


def coco_library(name: str | None = None) -> str:
    """The library that computes the metrics: `name`, or by default the first of `LIBRARIES` that is installed.

    Raises:
        ModuleNotFoundError: not installed; the message names the package to install.
        ValueError: a name that is not in `LIBRARIES`.
    """
    if name is not None and name not in LIBRARIES:
        raise ValueError(f"COCO library: expected one of {', '.join(LIBRARIES)}, got {name!r}.")
    for library in LIBRARIES if name is None else (name,):
        if importlib.util.find_spec(library) is not None:
            return library
    missing = "pycocotools (or faster-coco-eval)" if name is None else name
    package = "pycocotools" if name is None else name.replace("_", "-")
    raise ModuleNotFoundError(f"COCO's metrics need {missing}: pip install {package}")


def coco_result(
    ground_truth: dict, detections: Detections, library: str | None = None, source: str = "annotations"
) -> CocoResult:
    """COCO metrics of detections against annotations in COCO's format, over all their images.

    Images, annotations and categories are renumbered from 1 for the libraries: they ignore an annotation with id 0, and
    one of them stores ids as floating-point numbers, which merges ids above 2^53.

    Args:
        ground_truth: `images`, `annotations` (with `area` and `iscrowd`) and `categories`.
        detections: detections in those images; detections of other categories do not count.
        library: one of `LIBRARIES`; default: the fastest that is installed.
        source: origin of the annotations, for tables.

    Raises:
        ModuleNotFoundError: no such library is installed.
        ValueError: there are no annotations, or a detection belongs to another image.
    """
    library = coco_library(library)
    if "annotations" not in ground_truth:
        raise ValueError(f"{source} has no list 'annotations': there is nothing to compare detections with.")
    truth, kept = renumbered(ground_truth, detections, source)
    columns: dict[int, list[float]] = {}
    if len(kept) == 0:
        metrics = _metrics_without_detections(truth)
    else:
        with collection_paused(), contextlib.redirect_stdout(io.StringIO()):
            metrics, columns = _accumulated(truth, kept, library)
    objects = Counter(a["category_id"] for a in truth["annotations"] if not a["iscrowd"])
    per_class = [
        ClassMetrics(category["name"], objects[key], *columns.get(key, [0.0 if objects[key] else -1.0] * 4))
        for key, category in enumerate(ground_truth["categories"], 1)
    ]
    version = importlib.metadata.version(library.replace("_", "-"))
    counts = len(truth["images"]), objects.total()
    return CocoResult(metrics, per_class, source, *counts, f"{library.replace('_', '-')} {version}")


def renumbered(ground_truth: dict, detections: Detections, source: str) -> tuple[dict, Detections]:
    """Ground truth and detections with images, annotations and categories renumbered from 1 in their order.

    Drops detections of other categories.
    """
    images = {image["id"]: number for number, image in enumerate(ground_truth["images"], 1)}
    categories = {category["id"]: number for number, category in enumerate(ground_truth["categories"], 1)}
    annotations = [
        {**a, "id": number, "image_id": images[a["image_id"]], "category_id": categories[a["category_id"]]}
        for number, a in enumerate(ground_truth["annotations"], 1)
    ]
    truth = {
        # Some versions of pycocotools require it.
        "info": {},
        "images": [{**image, "id": images[image["id"]]} for image in ground_truth["images"]],
        "annotations": annotations,
        "categories": [{**category, "id": categories[category["id"]]} for category in ground_truth["categories"]],
    }
    image_ids, image_rows = np.unique(detections.image_ids, return_inverse=True)
    unknown = [image_id for image_id in image_ids.tolist() if image_id not in images]
    if unknown:
        raise ValueError(f"There are detections in image id {unknown[0]}, which is not in {source}.")
    numbers = np.array([images[image_id] for image_id in image_ids.tolist()], np.int64)
    category_ids, category_rows = np.unique(detections.category_ids, return_inverse=True)
    category_numbers = np.array([categories.get(key, 0) for key in category_ids.tolist()], np.int64)
    renumbered = Detections(numbers[image_rows], category_numbers[category_rows], detections.boxes, detections.scores)
    known = renumbered.category_ids > 0
    return truth, Detections(*(column[known] for column in vars(renumbered).values()))


def _accumulated(truth: dict, detections: Detections, library: str) -> tuple[dict[str, float], dict[int, list[float]]]:
    """The twelve metrics, and AP, AP50, AP75 and AR100 of each category by its number."""
    if library == "faster_coco_eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    annotated = COCO()
    annotated.dataset = truth
    annotated.createIndex()
    evaluation = COCOeval(annotated, annotated.loadRes(detections.to_coco()), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    # [10 IoU thresholds, 101 recalls, K classes] and [10, K], both of all areas and at most 100 detections.
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    recall = np.asarray(evaluation.eval["recall"])[:, :, 0, -1]
    columns = {
        category_id: [_mean(part) for part in (precision[..., k], precision[0, :, k], precision[5, :, k], recall[:, k])]
        for k, category_id in enumerate(evaluation.params.catIds)
    }
    stats = np.asarray(evaluation.stats)
    return {name: float(value) for name, value in zip(METRICS, stats, strict=True)}, columns


def _metrics_without_detections(truth: dict) -> dict[str, float]:
    """The twelve metrics if there are no detections: 0 if objects of that size exist, else -1."""
    areas = [a["area"] for a in truth["annotations"] if not a["iscrowd"]]
    present = {letter: any(low <= area <= high for area in areas) for letter, (low, high) in _AREAS.items()}
    return {name: 0.0 if present.get(name[-1], bool(areas)) else -1.0 for name in METRICS}


def _mean(values: np.ndarray) -> float:
    """Mean of the defined values; -1 marks undefined ones (no objects)."""
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else -1.0
