"""COCO's twelve numbers of a model on a data set, by faster-coco-eval or pycocotools, on one process or many."""

import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from conddetr.data.batch import Batch, make_loader
from conddetr.engine.arrival import Arrival
from conddetr.engine.precision import autocast, for_inference, has_bfloat16, resolve_precision
from conddetr.engine.progress import Progress
from conddetr.files import atomic_file
from conddetr.garbage import collection_paused
from conddetr.model.detr import DETR
from conddetr.model.postprocess import postprocess

log = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of the twelve numbers, in pycocotools' order; each in [0, 1], or -1 where no object counts and it does
not exist."""
_AREAS = {"s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, math.inf)}
"""COCO's sizes of objects, in pixels, by the letter at the end of a metric's name."""

LIBRARIES = ("faster_coco_eval", "pycocotools")
"""What can compute them, fastest first. Their numbers are the same."""

MAX_DETECTIONS = 100
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


def evaluate(
    model: DETR,
    classes: list[dict],
    dataset: Dataset,
    device: torch.device,
    batch_size: int = 2,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pad_buckets: int = 0,
    on_batch: Callable[[], None] | None = None,
    by_name: bool = False,
    precision: str = "auto",
) -> CocoResult | None:
    """COCO's numbers of a model on a data set, with a progress bar; None on every rank but 0.

    Arguments and errors as those of `detect` and `coco_result`.
    """
    detections = detect(
        model, classes, dataset, device, batch_size, workers, rank, world, pad_buckets, on_batch, by_name, precision
    )
    return None if detections is None else coco_result(dataset.ground_truth(), detections, source=dataset.source)


def detect(
    model: DETR,
    classes: list[dict],
    dataset: Dataset,
    device: torch.device,
    batch_size: int = 2,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pad_buckets: int = 0,
    on_batch: Callable[[], None] | None = None,
    by_name: bool = False,
    precision: str = "auto",
) -> Detections | None:
    """The best `MAX_DETECTIONS` detections of every image of a data set, with a progress bar.

    Args:
        model: any preset, on `device`. A frozen copy of it runs (`DETR.fused`), made anew for each call: that takes
            about as long as copying all weights. A model that was compiled runs itself, and so does one with backend
            `eager`.
        classes: `id` and `name` of every label of the model, as stored in checkpoints.
        dataset: `CocoDetection` or `SyntheticShapes`.
        device: where to run.
        batch_size: images per forward pass and rank.
        workers: processes that load images.
        rank, world: this process, and how many of torch's default process group share the data set: each takes other
            images. All of them must call this function.
        pad_buckets: pad batches to one of this many shapes, for a compiled model; 0: to the largest image of each.
        on_batch: called after every batch, on all ranks equally often; what it raises ends the evaluation.
        by_name: match classes by name, whatever their ids.
        precision: `float32`, `bfloat16`, or `auto`: bfloat16 where `has_bfloat16` says that the device has it.

    Returns:
        The detections of all ranks on rank 0, None on the others.

    Raises:
        ValueError: as `category_ids_of`.
    """
    category_ids = category_ids_of(classes, dataset.classes, by_name)
    batches = make_loader(
        dataset,
        batch_size,
        train=False,
        workers=workers,
        rank=rank,
        world=world,
        pad_buckets=pad_buckets,
        device=device,
    )
    with Progress("evaluate", total=len(range(rank, len(dataset), world)), disable=rank > 0) as progress:

        def after(count: int) -> None:
            progress.advance(count)
            if on_batch is not None:
                on_batch()

        precision = resolve_precision(precision, has_bfloat16(device))
        mine = _detect(model, batches, np.array(category_ids), device, after, precision)
        # The first rank has most images.
        for _ in range(-(-len(range(0, len(dataset), world)) // batch_size) - len(batches)):
            after(0)
    if world == 1:
        return mine
    parts: list[Detections | None] | None = [None] * world if rank == 0 else None
    dist.gather_object(mine, parts, dst=0)
    return Detections.join(parts) if rank == 0 else None


def category_ids_of(classes: list[dict], of_data: list[dict], by_name: bool = False) -> list[int]:
    """The data set's category id of every label of a model.

    Categories are the same where ids and names are. Where no id of the data set has another name in the model, names
    decide, as models of others number their classes otherwise; a line says so. Models that know no names, such as
    official checkpoints, go by ids; a line says so too.

    Args:
        classes, of_data: `id` and `name` of every label of the model, and of every category of the data set.
        by_name: names decide, whatever the ids.

    Raises:
        ValueError: an id has one name in the model and another in the data set; or the data set has a category that
            the model does not know, or two of one name where names decide.
    """
    own = [category["id"] for category in classes]
    named = {category["id"]: category["name"] for category in classes}
    unlike = [category for category in of_data if named.get(category["id"]) != category["name"]]
    if not unlike:
        return own
    first = unlike[0]
    if all(_is_nameless(category) for category in classes) and all(category["id"] in named for category in of_data):
        log.warning("The model's classes have no names: ids decide, id %s is %r.", first["id"], first["name"])
        return own
    clashing = [category for category in unlike if category["id"] in named]
    if clashing and not by_name:
        first = clashing[0]
        raise ValueError(
            f"Category id {first['id']} is {first['name']!r} in the data set and {named[first['id']]!r} in the model "
            f"({len(clashing)} such ids): use the annotations that it was trained on, or, where the same names mean "
            "the same classes, match them by name (--classes-by-name, by_name=True)."
        )
    return _ids_by_name(classes, of_data)


def _is_nameless(category: dict) -> bool:
    """Whether the name only repeats a number, as where a file of weights has none."""
    return category["name"] in (f"{category['id']}", f"LABEL_{category['id']}")


def _ids_by_name(classes: list[dict], of_data: list[dict]) -> list[int]:
    """As `category_ids_of`, by names alone; ids that the data set does not have for what it does not have."""
    names, ids = Counter(category["name"] for category in classes), {c["name"]: c["id"] for c in of_data}
    for category in of_data:
        if names[category["name"]] == 0:
            raise ValueError(
                f"The data set has a category that the model does not know, id {category['id']} "
                f"({category['name']!r}): evaluate on the classes it was trained on."
            )
        if names[category["name"]] > 1 or ids[category["name"]] != category["id"]:
            raise ValueError(
                f"Two categories have the name {category['name']!r}, and ids do not tell which is which: give both "
                "the data set and the model one name for each."
            )
    first = of_data[0]
    log.warning(
        "The data set numbers its classes otherwise than the model: they are matched by name, %r is id %s.",
        first["name"],
        first["id"],
    )
    unused = itertools.count(max([c["id"] for c in classes] + list(ids.values())) + 1)
    return [ids[category["name"]] if category["name"] in ids else next(unused) for category in classes]


def check_splits(train: list[dict], val: list[dict]) -> None:
    """Compare the categories of a training and a validation set.

    Raises:
        ValueError: an id has two names, or validation has a category that training does not have; names both.
    """
    named = {category["id"]: category["name"] for category in train}
    for category in val:
        own = named.get(category["id"])
        if own is None:
            raise ValueError(
                f"Category id {category['id']} ({category['name']!r}) is in the validation set and not in the training "
                "set: both need the same list of categories."
            )
        if own != category["name"]:
            raise ValueError(
                f"Category id {category['id']} is {own!r} in the training set and {category['name']!r} in the "
                "validation set: both need the same list of categories."
            )


@torch.no_grad()
def _detect(
    model: DETR,
    batches: Iterable[Batch],
    category_ids: np.ndarray,
    device: torch.device,
    on_batch: Callable[[int], None],
    precision: str,
) -> Detections:
    """Run over batches in eval mode, leaving the model in the mode it was in."""
    if isinstance(model, DETR):
        model = for_inference(model, precision)
    dtype = getattr(model, "dtype", torch.float32)
    was_training = model.training
    model.eval()
    parts: list[Detections] = []
    last: _Found | None = None
    try:
        for batch in batches:
            batch = batch.to(device)
            with autocast(model, precision):
                outputs = model(batch.model_input().to(dtype), valid_hw=batch.valid_hw)
            sizes = torch.tensor(batch.original_sizes).to(device, non_blocking=True)
            found = postprocess(outputs, sizes, MAX_DETECTIONS, model.config.activation)
            # Those of the batch before, so that the device has work meanwhile.
            parts += [last.read(category_ids)] if last else []
            last = _Found(batch.image_ids, found)
            on_batch(len(batch))
    finally:
        model.train(was_training)
    parts += [last.read(category_ids)] if last else []
    return Detections.join(parts)


class _Found:
    """The detections of a batch on their way to the host, in one copy."""

    def __init__(self, image_ids: tuple[int, ...], found: list[dict[str, Tensor]]) -> None:
        counts = [len(of_image["scores"]) for of_image in found]
        self._image_ids = np.repeat(np.array(image_ids, np.int64), counts)
        scores, labels, boxes = (torch.cat([image[key] for image in found]) for key in ("scores", "labels", "boxes"))
        boxes = box_convert(boxes.float(), "xyxy", "xywh")
        # Labels are small: float32 holds them exactly.
        self._rows = Arrival(torch.cat([boxes, scores.float().unsqueeze(1), labels.float().unsqueeze(1)], 1))

    def read(self, category_ids: np.ndarray) -> Detections:
        """Wait until they have arrived."""
        rows = self._rows.wait().numpy()
        return Detections(
            self._image_ids, category_ids[rows[:, 5].astype(np.int64)], rows[:, :4].copy(), rows[:, 4].copy()
        )


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
