"""A model's detections on a data set, and their COCO metrics, on one process or several."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.ops import box_convert

from conddetr.data.batch import Batch
from conddetr.data.loader import make_loader
from conddetr.data.sets import ImageSet
from conddetr.engine.arrival import Arrival
from conddetr.engine.categories import category_ids_of
from conddetr.engine.coco_metrics import CocoResult, Detections, coco_result
from conddetr.engine.precision import autocast, for_inference, has_bfloat16, resolve_precision
from conddetr.engine.progress import Progress
from conddetr.model.detr import DETR
from conddetr.model.postprocess import postprocess

MAX_DETECTIONS = 100


def evaluate(
    model: DETR,
    classes: list[dict],
    dataset: ImageSet,
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
    """COCO metrics of a model on a data set, with a progress bar; None on all ranks but 0.

    Arguments and errors are those of `detect` and `coco_result`.
    """
    detections = detect(
        model, classes, dataset, device, batch_size, workers, rank, world, pad_buckets, on_batch, by_name, precision
    )
    return None if detections is None else coco_result(dataset.ground_truth(), detections, source=dataset.source)


def detect(
    model: DETR,
    classes: list[dict],
    dataset: ImageSet,
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
        model: any preset, on `device`. Each call runs a new frozen copy of it (`DETR.fused`), which takes about as long
            to make as a copy of all weights. A compiled model, and one with backend `eager`, runs itself.
        classes: `id` and `name` of every label of the model, as stored in checkpoints.
        dataset: `CocoDetection` or `SyntheticShapes`.
        device: where to run.
        batch_size: images per forward pass and rank.
        workers: processes that load images.
        rank, world: this process's rank in torch's default process group, and the number of processes, which share the
            images. All of them must call this function.
        pad_buckets: pad batches to one of this many shapes, for a compiled model; 0: to the largest image of the batch.
        on_batch: called after every batch, equally often on all ranks; an exception from it ends the evaluation.
        by_name: match classes by name and ignore their ids.
        precision: `float32`, `bfloat16`, or `auto`: bfloat16 if `has_bfloat16` is true for the device.

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

        def count_batch(count: int) -> None:
            progress.advance(count)
            if on_batch is not None:
                on_batch()

        precision = resolve_precision(precision, has_bfloat16(device))
        local = _detect(model, batches, np.array(category_ids), device, count_batch, precision)
        # The first rank has the most batches; the others make up for theirs.
        for _ in range(-(-len(range(0, len(dataset), world)) // batch_size) - len(batches)):
            count_batch(0)
    if world == 1:
        return local
    by_rank: list[Detections | None] | None = [None] * world if rank == 0 else None
    dist.gather_object(local, by_rank, dst=0)
    return Detections.join(by_rank) if rank == 0 else None


@torch.no_grad()
def _detect(
    model: DETR,
    batches: Iterable[Batch],
    category_ids: np.ndarray,
    device: torch.device,
    on_batch: Callable[[int], None],
    precision: str,
) -> Detections:
    """Detections of all batches, in eval mode; restores the model's mode."""
    if isinstance(model, DETR):
        model = for_inference(model, precision)
    dtype = getattr(model, "dtype", torch.float32)
    was_training = model.training
    model.eval()
    parts: list[Detections] = []
    last: _BatchDetections | None = None
    try:
        for batch in batches:
            batch = batch.to(device)
            with autocast(model, precision):
                outputs = model(batch.model_input().to(dtype), valid_hw=batch.valid_hw)
            sizes = torch.tensor(batch.original_sizes).to(device, non_blocking=True)
            detections = postprocess(outputs, sizes, MAX_DETECTIONS, model.config.activation)
            # The previous batch is read now, while the device computes this one.
            parts += [last.read(category_ids)] if last else []
            last = _BatchDetections(batch.image_ids, detections)
            on_batch(len(batch))
    finally:
        model.train(was_training)
    parts += [last.read(category_ids)] if last else []
    return Detections.join(parts)


class _BatchDetections:
    """Detections of a batch in one asynchronous copy to the host."""

    def __init__(self, image_ids: tuple[int, ...], detections: list[dict[str, Tensor]]) -> None:
        counts = [len(item["scores"]) for item in detections]
        self._image_ids = np.repeat(np.array(image_ids, np.int64), counts)
        scores, labels, boxes = (
            torch.cat([image[key] for image in detections]) for key in ("scores", "labels", "boxes")
        )
        boxes = box_convert(boxes.float(), "xyxy", "xywh")
        # Labels are small: float32 holds them exactly.
        self._rows = Arrival(torch.cat([boxes, scores.float().unsqueeze(1), labels.float().unsqueeze(1)], 1))

    def read(self, category_ids: np.ndarray) -> Detections:
        """Wait for the copy; returns the detections."""
        rows = self._rows.wait().numpy()
        return Detections(
            self._image_ids, category_ids[rows[:, 5].astype(np.int64)], rows[:, :4].copy(), rows[:, 4].copy()
        )
