"""Detections in COCO's format, and COCO's twelve numbers of them, by faster-coco-eval or pycocotools."""

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
"""Names of the twelve numbers, in pycocotools' order; each in [0, 1], or -1 where no object counts and it does
not exist."""
_AREAS = {"s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, math.inf)}
"""COCO's sizes of objects, in pixels, by the letter at the end of a metric's name."""

LIBRARIES = ("faster_coco_eval", "pycocotools")
"""What can compute them, fastest first. Their numbers are the same."""

WRITTEN_AT_ONCE = 10_000
"""Detections that are dicts and text at a time, when they are written."""


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
        """Those of all parts in the order of their image ids, the order within an image kept."""
        empty = cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 4), np.float32), np.empty(0, np.float32))
        columns = zip(*(vars(part).values() for part in (empty, *parts)), strict=True)
        columns = [np.concatenate(column) for column in columns]
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
        """Write COCO's results JSON, whole or not at all; a part at a time, so that memory stays that of the arrays."""
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
    """What an evaluation finds."""

    metrics: dict[str, float]
    """COCO's twelve numbers by the names in `METRICS`."""
    per_class: list[ClassMetrics]
    """In the order of the ground truth's categories."""
    source: str
    """What was evaluated on: an annotation file, with the number of its images where these are not all."""
    images: int
    objects: int
    """Annotated boxes, crowds not counted."""
    library: str
    """What computed the numbers, with its version."""

    def describe(self) -> str:
        """What the numbers are of, in one line."""
        return f"{self.source}: {self.images} images, {self.objects} objects; by {self.library}"


def coco_library(name: str | None = None) -> str:
    """The library that computes the metrics: the one asked for, else the first of `LIBRARIES` that is installed.

    Raises:
        ModuleNotFoundError: not installed; says what to install.
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
    """COCO's numbers of detections against annotations in COCO's format, over all their images.

    The libraries are given ids from 1 on: they take an annotation with id 0 for none, and one of them keeps ids as
    floating numbers, which merge those above 2^53.

    Args:
        ground_truth: `images`, `annotations` (with `area` and `iscrowd`) and `categories`.
        detections: of those images; those of other categories do not count.
        library: one of `LIBRARIES`; default: the fastest that is installed.
        source: where the annotations are from, for tables.

    Raises:
        ModuleNotFoundError: no such library is installed.
        ValueError: there are no annotations, or detections are of an image that is not among these.
    """
    library = coco_library(library)
    if "annotations" not in ground_truth:
        raise ValueError(f"{source} has no list 'annotations': there is nothing to compare detections with.")
    truth, found = _renumbered(ground_truth, detections, source)
    if len(found) == 0:
        metrics, columns = _nothing_found(truth), {}
    else:
        with collection_paused(), contextlib.redirect_stdout(io.StringIO()):
            metrics, columns = _accumulated(truth, found, library)
    objects = Counter(a["category_id"] for a in truth["annotations"] if not a["iscrowd"])
    per_class = [
        ClassMetrics(category["name"], objects[key], *columns.get(key, [0.0 if objects[key] else -1.0] * 4))
        for key, category in enumerate(ground_truth["categories"], 1)
    ]
    version = importlib.metadata.version(library.replace("_", "-"))
    counts = len(truth["images"]), objects.total()
    return CocoResult(metrics, per_class, source, *counts, f"{library.replace('_', '-')} {version}")


def _renumbered(ground_truth: dict, detections: Detections, source: str) -> tuple[dict, Detections]:
    """Annotations and detections with images, annotations and categories numbered from 1, in their order."""
    images = {image["id"]: number for number, image in enumerate(ground_truth["images"], 1)}
    categories = {category["id"]: number for number, category in enumerate(ground_truth["categories"], 1)}
    annotations = [
        {**a, "id": number, "image_id": images[a["image_id"]], "category_id": categories[a["category_id"]]}
        for number, a in enumerate(ground_truth["annotations"], 1)
    ]
    truth = {
        # Some versions of pycocotools look for it.
        "info": {},
        "images": [{**image, "id": images[image["id"]]} for image in ground_truth["images"]],
        "annotations": annotations,
        "categories": [{**category, "id": categories[category["id"]]} for category in ground_truth["categories"]],
    }
    own, places = np.unique(detections.image_ids, return_inverse=True)
    strange = [image_id for image_id in own.tolist() if image_id not in images]
    if strange:
        raise ValueError(f"Detections are of image id {strange[0]}, which is not in {source}.")
    numbers = np.array([images[image_id] for image_id in own.tolist()], np.int64)
    of_class, class_places = np.unique(detections.category_ids, return_inverse=True)
    class_numbers = np.array([categories.get(key, 0) for key in of_class.tolist()], np.int64)
    renumbered = Detections(numbers[places], class_numbers[class_places], detections.boxes, detections.scores)
    known = renumbered.category_ids > 0
    return truth, Detections(*(column[known] for column in vars(renumbered).values()))


def _accumulated(truth: dict, found: Detections, library: str) -> tuple[dict[str, float], dict[int, list[float]]]:
    """The twelve numbers, and AP, AP50, AP75 and AR100 of each category by its number."""
    if library == "faster_coco_eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    annotated = COCO()
    annotated.dataset = truth
    annotated.createIndex()
    evaluation = COCOeval(annotated, annotated.loadRes(found.to_coco()), "bbox")
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


def _nothing_found(truth: dict) -> dict[str, float]:
    """The twelve numbers without any detection: 0 where there are objects to be found."""
    areas = [a["area"] for a in truth["annotations"] if not a["iscrowd"]]
    present = {letter: any(low <= area <= high for area in areas) for letter, (low, high) in _AREAS.items()}
    return {name: 0.0 if present.get(name[-1], bool(areas)) else -1.0 for name in METRICS}


def _mean(values: np.ndarray) -> float:
    """Of what counts: -1 marks thresholds without objects."""
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else -1.0
