"""COCO's twelve numbers of a model on a data set, by faster-coco-eval or pycocotools, on one process or many."""

import contextlib
import gc
import importlib.util
import io
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
from conddetr.engine.progress import Progress
from conddetr.files import atomic_file
from conddetr.model.detr import DETR
from conddetr.model.postprocess import postprocess

log = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of the twelve numbers, in pycocotools' order; each in [0, 1], or -1 where nothing counts."""

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
) -> CocoResult | None:
    """COCO's numbers of a model on a data set, with a progress bar; None on every rank but 0.

    Arguments and errors as those of `detect` and `coco_result`.
    """
    detections = detect(model, classes, dataset, device, batch_size, workers, rank, world, pad_buckets, on_batch)
    return None if detections is None else coco_result(dataset.ground_truth(), detections)


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
) -> Detections | None:
    """The best `MAX_DETECTIONS` detections of every image of a data set, with a progress bar.

    Args:
        model: any preset, on `device`. A frozen copy of it runs (`DETR.fused`), made anew for each call: that takes
            about as long as copying all weights. A model that was compiled runs itself.
        classes: `id` and `name` of every label of the model, as stored in checkpoints.
        dataset: `CocoDetection` or `SyntheticShapes`.
        device: where to run.
        batch_size: images per forward pass and rank.
        workers: processes that load images.
        rank, world: this process, and how many of torch's default process group share the data set: each takes other
            images. All of them must call this function.
        pad_buckets: pad batches to one of this many shapes, for a compiled model; 0: to the largest image of each.
        on_batch: called after every batch, on all ranks equally often; what it raises ends the evaluation.

    Returns:
        The detections of all ranks on rank 0, None on the others.

    Raises:
        ValueError: as `category_ids_of`.
    """
    category_ids = category_ids_of(classes, dataset.classes)
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

        mine = _detect(model, batches, np.array(category_ids), device, after)
        # The first rank has most images.
        for _ in range(-(-len(range(0, len(dataset), world)) // batch_size) - len(batches)):
            after(0)
    if world == 1:
        return mine
    parts: list[Detections | None] | None = [None] * world if rank == 0 else None
    dist.gather_object(mine, parts, dst=0)
    return Detections.join(parts) if rank == 0 else None


def category_ids_of(classes: list[dict], of_data: list[dict]) -> list[int]:
    """The data set's category id of every label of a model.

    The model's own ids, where they have the same names in the data set; else those of the same names, as models of
    others number their classes otherwise. Where names do not tell, ids decide, with a warning.

    Args:
        classes, of_data: `id` and `name` of every label of the model, and of every category of the data set.

    Raises:
        ValueError: the data set has a category that the model does not know.
    """
    own = [category["id"] for category in classes]
    named = {category["id"]: category["name"] for category in classes}
    unlike = [category for category in of_data if named.get(category["id"]) != category["name"]]
    if not unlike:
        return own
    names, ids = Counter(named.values()), {category["name"]: category["id"] for category in of_data}
    if len(ids) == len(of_data) and all(names[name] == 1 for name in ids):
        log.warning("The data set numbers its classes otherwise than the model: they are matched by name.")
        unused = itertools.count(max(*own, *ids.values()) + 1)
        return [ids[category["name"]] if category["name"] in ids else next(unused) for category in classes]
    unknown = [category for category in of_data if category["id"] not in named]
    if unknown:
        raise ValueError(
            f"The data set has {len(unknown)} categories that the model does not know, first "
            f"id {unknown[0]['id']} ({unknown[0]['name']!r}): evaluate on the classes it was trained on."
        )
    first = unlike[0]
    log.warning(
        "%d categories of the data set have another name in the model, first id %s (%r, there %r): ids decide.",
        len(unlike),
        first["id"],
        first["name"],
        named[first["id"]],
    )
    return own


@torch.no_grad()
def _detect(
    model: DETR,
    batches: Iterable[Batch],
    category_ids: np.ndarray,
    device: torch.device,
    on_batch: Callable[[int], None],
) -> Detections:
    """Run over batches in eval mode, leaving the model in the mode it was in."""
    if isinstance(model, DETR) and model.fusion is None and model._compiled_call_impl is None:
        model = model.fused()
    dtype = getattr(model, "dtype", torch.float32)
    was_training = model.training
    model.eval()
    parts: list[Detections] = []
    last: _Found | None = None
    try:
        for batch in batches:
            batch = batch.to(device)
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


def coco_result(ground_truth: dict, detections: Detections, library: str | None = None) -> CocoResult:
    """COCO's numbers of detections against annotations in COCO's format, over all their images.

    Args:
        ground_truth: `images`, `annotations` (with `area` and `iscrowd`) and `categories`.
        detections: of those images.
        library: one of `LIBRARIES`; default: the fastest that is installed.

    Raises:
        ModuleNotFoundError: no such library is installed.
    """
    library = coco_library(library)
    if len(detections) == 0:
        return _nothing_found(ground_truth)
    with _collection_paused(), contextlib.redirect_stdout(io.StringIO()):
        stats, precision, recall, category_ids = _accumulated(ground_truth, detections, library)
    columns = {
        category_id: [_mean(part) for part in (precision[..., k], precision[0, :, k], precision[5, :, k], recall[:, k])]
        for k, category_id in enumerate(category_ids)
    }
    return CocoResult(
        {name: float(value) for name, value in zip(METRICS, stats, strict=True)},
        [ClassMetrics(name, count, *columns[key]) for key, name, count in _objects(ground_truth)],
    )


def _accumulated(
    ground_truth: dict, detections: Detections, library: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """The twelve numbers; precision [10 IoU thresholds, 101 recalls, K classes] and recall [10, K], both of all areas
    and at most 100 detections; and the ids of the K classes."""
    if library == "faster_coco_eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    truth = COCO()
    truth.dataset = ground_truth
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(detections.to_coco()), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    recall = np.asarray(evaluation.eval["recall"])[:, :, 0, -1]
    return np.asarray(evaluation.stats), precision, recall, evaluation.params.catIds


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """No search for cycles of garbage: half a million new dicts, all in use, start it again and again. They should be
    gone by the end, or the next search walks through them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _nothing_found(ground_truth: dict) -> CocoResult:
    per_class = [ClassMetrics(name, count, *[0.0 if count else -1.0] * 4) for _, name, count in _objects(ground_truth)]
    return CocoResult(dict.fromkeys(METRICS, 0.0), per_class)


def _objects(ground_truth: dict) -> list[tuple[int, str, int]]:
    """Id, name and number of annotated boxes of every category."""
    counts = Counter(a["category_id"] for a in ground_truth["annotations"] if not a["iscrowd"])
    return [(category["id"], category["name"], counts[category["id"]]) for category in ground_truth["categories"]]


def _mean(values: np.ndarray) -> float:
    """Of what counts: -1 marks thresholds without objects."""
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else -1.0
