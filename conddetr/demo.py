"""The demonstration behind `make demo`: train, evaluate, draw."""

from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from conddetr.detector import Detector
from conddetr.engine.progress import console, metrics_table
from conddetr.model.postprocess import postprocess
from conddetr.viz.attention import attention_figure, attention_maps
from conddetr.viz.boxes import denormalize, draw_boxes, save_figure

MAX_ROWS = 3
"""Objects per picture of attention maps."""
THRESHOLD = 0.3
"""Least score that is drawn: after minutes of training, scores are still low."""


def draw_samples(detector: Detector, dataset: Dataset, output_dir: str | Path, count: int = 6) -> list[Path]:
    """Draw detections and attention maps of the first images of a data set beside the ground truth.

    Args:
        detector: trained on the classes of the data set.
        dataset: `CocoDetection` with an `EvalTransform`, or `SyntheticShapes`.
        output_dir: where `detections.png` and `attention-{i}.png` go.
        count: how many images.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure

    output_dir = Path(output_dir)
    count = min(count, len(dataset))
    figure = Figure(figsize=(2.6 * count, 5.4), layout="constrained")
    grid = figure.subplots(2, count, squeeze=False)
    written = []
    for index in range(count):
        pixels, target = dataset[index]
        image = denormalize(pixels)
        truth = _truth(target, image, detector)
        output, maps = attention_maps(detector.model, pixels.to(detector.device))
        found, queries = _best(output, tuple(image.shape[-2:]), detector)
        draw_boxes(grid[0, index], image, *truth, title="ground truth")
        draw_boxes(grid[1, index], image, *found, title="detections")
        if len(written) < 3 and len(queries):
            shown = [part[:MAX_ROWS] for part in found]
            per_object = maps.mean(1)[:, queries[:MAX_ROWS]]
            picture = attention_figure(image, truth, tuple(shown), per_object)
            written.append(save_figure(picture, output_dir / f"attention-{len(written)}.png"))
    written.insert(0, save_figure(figure, output_dir / "detections.png"))
    return written


def _truth(target: dict, image: torch.Tensor, detector: Detector) -> tuple:
    height, width = image.shape[-2:]
    boxes = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
    labels = target["labels"].tolist()
    return boxes, labels, [detector.classes[label]["name"] for label in labels]


def _best(output: dict, size: tuple[int, int], detector: Detector) -> tuple[tuple, list[int]]:
    """Detections above the threshold, or the best one where none is: boxes, labels, captions; and their queries."""
    activation = detector.model.config.activation
    found = {k: v.cpu() for k, v in postprocess(output, [size], 100, activation)[0].items()}
    count = max(1, int((found["scores"] > THRESHOLD).sum()))
    scores, labels, boxes = (found[key][:count] for key in ("scores", "labels", "boxes"))
    captions = [
        f"{detector.classes[label]['name']} {score:.2f}"
        for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
    ]
    # The query of a detection is the one whose box it carries.
    height, width = size
    scale = boxes.new_tensor([width, height, width, height])
    all_boxes = box_convert(output["pred_boxes"][0].cpu().float(), "cxcywh", "xyxy") * scale
    queries = torch.cdist(boxes, all_boxes).argmin(1).tolist()
    return (boxes, labels.tolist(), captions), queries


def report(metrics: dict[str, float], files: list[Path]) -> None:
    """Print what the demonstration found and wrote."""
    console.print(metrics_table("COCO metrics on held-out images, in percent", metrics))
    for file in files:
        console.print(f"wrote {file}", highlight=False, soft_wrap=True)
