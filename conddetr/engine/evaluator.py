"""A model's detections on a data set, and COCO's twelve numbers of them, on one process or many."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from conddetr.data.batch import Batch, make_loader
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
