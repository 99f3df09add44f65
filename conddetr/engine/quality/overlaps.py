"""Detections and objects of all images in flat arrays, with the pairs that overlap."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from conddetr.engine.coco_metrics import Detections, coco_library, renumbered

LEAST_IOU = 0.1
"""Pairs below this IoU are not kept; TIDE's limit between a badly placed detection and one on the background."""
MAX_PER_CLASS = 100
"""COCO's limit of detections per image and class; the best ones count."""


@dataclass(frozen=True)
class Overlaps:
    """M objects, N detections, and their P pairs in the same image with an IoU of at least `LEAST_IOU`."""

    names: list[str]
    """Names of the K classes, in the order of the ground truth's categories."""
    object_images: np.ndarray
    """[M] int64, position in the ground truth's images, ascending."""
    object_classes: np.ndarray
    """[M] int64, index into `names`."""
    object_boxes: np.ndarray
    """[M, 4] float64, xywh in pixels of the original image."""
    crowds: np.ndarray
    """[M] bool."""
    images: np.ndarray
    """[N] int64, as `object_images`. Detections are sorted by score, best first."""
    classes: np.ndarray
    """[N] int64, as `object_classes`."""
    boxes: np.ndarray
    """[N, 4] float64, as `object_boxes`."""
    scores: np.ndarray
    """[N] float32, descending."""
    pair_detections: np.ndarray
    """[P] int64, ascending."""
    pair_objects: np.ndarray
    """[P] int64."""
    ious: np.ndarray
    """[P] float64, descending for each detection. With a crowd: the share of the detection inside it, as in COCO."""

    @property
    def same_class(self) -> np.ndarray:
        """[P] bool, whether detection and object have the same class."""
        return self.classes[self.pair_detections] == self.object_classes[self.pair_objects]

    @property
    def with_crowd(self) -> np.ndarray:
        """[P] bool, whether the object is a crowd."""
        return self.crowds[self.pair_objects]

    def objects_per_class(self) -> np.ndarray:
        """[K] int64, objects of each class, crowds not counted."""
        return np.bincount(self.object_classes[~self.crowds], minlength=len(self.names))


def find_overlaps(ground_truth: dict, detections: Detections, source: str = "annotations") -> Overlaps:
    """Compute which detections overlap which objects.

    Detections of categories that the ground truth lacks are dropped, as in `coco_result`, and so are all but the best
    `MAX_PER_CLASS` of an image and a class.

    Args:
        ground_truth: in COCO's format, with `iscrowd`.
        detections: detections in its images, in any order.
        source: origin of the annotations, for errors.

    Raises:
        ValueError: a detection belongs to another image.
        ModuleNotFoundError: no library for COCO's metrics is installed; its IoU is used.
    """
    truth, known = renumbered(ground_truth, detections, source)
    annotations = sorted(truth["annotations"], key=lambda annotation: annotation["image_id"])
    count = len(annotations)
    object_images, object_classes, crowds = (
        np.fromiter((a[key] for a in annotations), np.int64, count) for key in ("image_id", "category_id", "iscrowd")
    )
    object_boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(count, 4)
    best = _best_first(known)
    columns = known.image_ids[best] - 1, known.category_ids[best] - 1, known.boxes[best].astype(np.float64)
    pairs = _pairs(object_images - 1, object_boxes, crowds, columns[0], columns[2])
    return Overlaps(
        [category["name"] for category in ground_truth["categories"]],
        object_images - 1,
        object_classes - 1,
        object_boxes,
        crowds.astype(bool),
        *columns,
        known.scores[best],
        *pairs,
    )


def _best_first(detections: Detections) -> np.ndarray:
    """Rows of the detections that count, by descending score; equal scores by image, then in the given order, which is
    COCO's order within a class.
    """
    images, categories, scores = detections.image_ids, detections.category_ids, detections.scores
    rows = np.lexsort((-scores, categories, images))
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (np.diff(images[rows]) != 0) | (np.diff(categories[rows]) != 0)
    position = np.arange(len(rows))
    rank = position - np.maximum.accumulate(np.where(is_first, position, 0))
    rows = rows[rank < MAX_PER_CLASS]
    return rows[np.lexsort((rows, images[rows], -scores[rows]))]


def _pairs(
    object_images: np.ndarray, object_boxes: np.ndarray, crowds: np.ndarray, images: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`pair_detections`, `pair_objects` and `ious`; arguments as the fields of `Overlaps`."""
    iou = _iou_function()
    rows = np.argsort(images, kind="stable")
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for image in np.intersect1d(object_images, images).tolist():
        objects = slice(*np.searchsorted(object_images, [image, image + 1]).tolist())
        local = rows[slice(*np.searchsorted(images, [image, image + 1], sorter=rows).tolist())]
        overlap = np.asarray(iou(boxes[local], object_boxes[objects], crowds[objects].tolist()))
        above = np.nonzero(overlap >= LEAST_IOU)
        parts.append((local[above[0]], above[1] + objects.start, overlap[above]))
    empty = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64)
    detection, target, overlaps = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
    # COCO prefers the later of two objects with equal IoU.
    order = np.lexsort((-target, -overlaps, detection))
    return detection[order], target[order], overlaps[order]


def _iou_function() -> Callable[[np.ndarray, np.ndarray, list[int]], np.ndarray]:
    """The IoU of xywh boxes that COCO's metrics use, with its meaning for crowds."""
    if coco_library() == "faster_coco_eval":
        from faster_coco_eval.core.mask import iou
    else:
        from pycocotools.mask import iou
    return iou
