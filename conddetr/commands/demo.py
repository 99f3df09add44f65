"""`conddetr demo`, which `make demo` runs: train, evaluate, draw."""

import argparse
import itertools
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from conddetr.config.run import resolve_run
from conddetr.detector import Detector
from conddetr.devices import find_device
from conddetr.engine.checkpoint import LATEST, has_run
from conddetr.engine.coco_metrics import CocoResult
from conddetr.engine.progress import say, show
from conddetr.engine.run import train
from conddetr.engine.tables import metrics_table, percent
from conddetr.viz.attention import attention_figure
from conddetr.viz.boxes import denormalize, draw_boxes, save_figure

RECIPE = {
    "epochs": 8,
    "eval_every": 8,
    "schedule": "cosine",
    "warmup_steps": 50,
    "class_weight": 10.0,
    "clip_max_norm": 0.02,
    "workers": 1,
}
"""Two minutes on two CPU cores, on synthetic shapes. Boxes are learned long before classes, so the class loss has five
times its usual weight. One process trains on one thread (`use_one_thread`), and another draws the images."""
WORKERS_BESIDE_A_GPU = 2
"""Processes that draw shapes on a machine with a GPU: training is faster there and would wait for a single process."""
RECIPE_FOR_PHOTOS = {"epochs": 100, "lr_drop": 80, "eval_every": 50, "time_limit": 600.0}
"""Many epochs over a small set of real images, within ten minutes."""
EXPECTED_AP50 = 0.85
"""Smallest accepted AP50 on held-out shapes."""
ATTENTION_PICTURES = 3
THRESHOLD = 0.3
"""Smallest score that is drawn; the best detection of an image is always drawn. After minutes of training, scores are
still low."""


def run(options: argparse.Namespace) -> None:
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"--seconds: expected more than 0, got {options.seconds:g}.")
    out = free_folder(options.out)
    recipe = RECIPE_FOR_PHOTOS if options.coco_path else recipe_for_shapes(options.device)
    chosen = {"preset": "conditional-detr-tiny", "coco_path": options.coco_path, "output_dir": str(out), **recipe}
    if options.seconds is not None:
        chosen["time_limit"] = options.seconds
    if not options.coco_path:
        use_one_thread()
        say("training a tiny detector on synthetic shapes: about two minutes on two CPU cores")
    trainer = train(resolve_run({**chosen, "device": options.device or ""}), show_config=False)
    detector = Detector.from_checkpoint(out / LATEST, device=options.device)
    report(trainer.result, draw_samples(detector, trainer.val_set, out))
    if not options.coco_path and options.seconds is None:
        check_learned(trainer.metrics)


def recipe_for_shapes(device: str | None) -> dict[str, object]:
    """Options of the training on synthetic shapes; `device` as torch names it, default: CUDA if available."""
    is_gpu = find_device(device).type == "cuda"
    return {**RECIPE, "workers": WORKERS_BESIDE_A_GPU if is_gpu else RECIPE["workers"]}


def free_folder(wanted: str | Path) -> Path:
    """The first of `wanted`, `wanted-2`, `wanted-3`, … that holds no run, so that no earlier run is lost."""
    wanted = Path(wanted)
    names = itertools.chain([wanted.name], (f"{wanted.name}-{number}" for number in itertools.count(2)))
    return next(folder for folder in map(wanted.with_name, names) if not has_run(folder))


def draw_samples(detector: Detector, dataset: Dataset, output_dir: str | Path, count: int = 6) -> list[Path]:
    """Draw detections beside the ground truth for the first images of a data set, and attention maps for some.

    Args:
        detector: trained on the classes of the data set.
        dataset: `CocoDetection` with an `EvalTransform`, or `SyntheticShapes`.
        output_dir: folder for `detections.png` and `attention-{i}.png`.
        count: number of images.

    Returns:
        The files written.
    """
    output_dir = Path(output_dir)
    count = min(count, len(dataset))
    figure = Figure(figsize=(2.6 * count, 5.4), layout="constrained")
    grid = figure.subplots(2, count, squeeze=False)
    written = []
    for index in range(count):
        pixels, target = dataset[index]
        image = denormalize(pixels)
        truth = _truth(target, image, detector)
        detection = detector.predict(image, THRESHOLD)[0]
        if not detection:
            detection = detector.predict(image, threshold=0.0, top_k=1)[0]
        draw_boxes(grid[0, index], image, *truth, title="ground truth")
        draw_boxes(
            grid[1, index], image, detection.boxes, detection.labels.tolist(), detection.captions, title="detections"
        )
        if index < ATTENTION_PICTURES:
            best, maps = detector.attention(image)
            picture = attention_figure(image, best, 0, maps)
            written.append(save_figure(picture, output_dir / f"attention-{index}.png"))
    written.insert(0, save_figure(figure, output_dir / "detections.png"))
    return written


def _truth(target: dict, image: torch.Tensor, detector: Detector) -> tuple:
    height, width = image.shape[-2:]
    boxes = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
    labels = target["labels"].tolist()
    return boxes, labels, [detector.classes[label]["name"] for label in labels]


def use_one_thread() -> None:
    """Train on one thread: more gain nothing on a tiny model and would wait for the core that draws the images.

    The weights then do not depend on the number of cores.
    """
    torch.set_num_threads(1)


def check_learned(metrics: dict[str, float]) -> None:
    """Print whether the model has learned to detect synthetic shapes.

    Raises:
        ValueError: it has not learned; all files are written nevertheless.
    """
    result = f"AP50 {percent(metrics['AP50'])} on held-out shapes"
    least = f"at least {100 * EXPECTED_AP50:.0f} is expected"
    if metrics["AP50"] < EXPECTED_AP50:
        raise ValueError(f"{result}: {least}. Something is wrong with this installation: try `make test`.")
    say(f"{result}: the model has learned ({least})")


def report(result: CocoResult, files: list[Path]) -> None:
    """Print the demonstration's metrics and the files it wrote."""
    show("COCO metrics on held-out images, in percent", metrics_table(result.metrics))
    say(result.describe())
    for file in files:
        say(f"wrote {file}")
