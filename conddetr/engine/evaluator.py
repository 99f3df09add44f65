"""COCO's twelve numbers, by pycocotools."""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from conddetr.data.batch import Batch, make_loader
from conddetr.engine.progress import Progress
from conddetr.model.detr import DETR
from conddetr.model.postprocess import postprocess

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of the twelve numbers, in pycocotools' order; each in [0, 1], or -1 where nothing counts."""

MAX_DETECTIONS = 100


def evaluate(
    model: DETR,
    classes: list[dict],
    dataset: Dataset,
    device: torch.device,
    batch_size: int = 2,
    workers: int = 0,
) -> dict[str, float]:
    """The twelve COCO numbers of a model on a data set, with a progress bar.

    Args:
        model: any preset, on `device`.
        classes: `id` and `name` of every label of the model, as stored in checkpoints.
        dataset: `CocoDetection` or `SyntheticShapes`.
        device: where to run.
        batch_size: images per forward pass.
        workers: processes that load images.

    Raises:
        ValueError: the data set has a category that the model does not know.
    """
    category_ids = [category["id"] for category in classes]
    unknown = [category for category in dataset.classes if category["id"] not in category_ids]
    if unknown:
        raise ValueError(
            f"The data set has {len(unknown)} categories that the model does not know, first "
            f"id {unknown[0]['id']} ({unknown[0]['name']!r}): evaluate on the classes it was trained on."
        )
    batches = make_loader(dataset, batch_size, train=False, workers=workers, device=device)
    with Progress("evaluate", total=len(dataset)) as progress:
        results = detect(model, batches, category_ids, device, progress.advance)
    return coco_metrics(dataset.ground_truth(), results)


@torch.no_grad()
def detect(
    model: DETR,
    batches: Iterable[Batch],
    category_ids: list[int],
    device: torch.device,
    on_batch: Callable[[int], None] = lambda images: None,
) -> list[dict]:
    """Run a model over batches and collect its detections in COCO's results format.

    Args:
        model: any preset; left in the mode it was in.
        batches: of any loader.
        category_ids: COCO category id of every label of the model.
        device: where to run.
        on_batch: called after every batch with its number of images, for progress.

    Returns:
        `image_id`, `category_id`, `bbox` (xywh in pixels of the original image) and `score`, best first per image.
    """
    was_training = model.training
    model.eval()
    results = []
    for batch in batches:
        batch = batch.to(device)
        outputs = model(batch.model_input(), batch.mask)
        detections = postprocess(outputs, list(batch.original_sizes), MAX_DETECTIONS, model.config.activation)
        for image_id, found in zip(batch.image_ids, detections, strict=True):
            results += _coco_results(image_id, found, category_ids)
        on_batch(len(batch))
    model.train(was_training)
    return results


def require_pycocotools() -> None:
    """Raise a ModuleNotFoundError that says what to install, before any work is done that would be lost."""
    if importlib.util.find_spec("pycocotools") is None:
        raise ModuleNotFoundError("COCO's metrics need pycocotools: pip install pycocotools")


def coco_metrics(ground_truth: dict, results: list[dict]) -> dict[str, float]:
    """The twelve COCO numbers of detections against annotations in COCO's format, over all their images.

    Raises:
        ModuleNotFoundError: pycocotools is not installed.
    """
    require_pycocotools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not results:
        return dict.fromkeys(METRICS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}


def _coco_results(image_id: int, found: dict[str, Tensor], category_ids: list[int]) -> list[dict]:
    boxes = found["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    columns = (found["labels"].tolist(), boxes.tolist(), found["scores"].tolist())
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(*columns, strict=True)
    ]
