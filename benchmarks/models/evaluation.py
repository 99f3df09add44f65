"""COCO metrics of 5,000 images × 100 synthetic detections, by every library that computes them.

python benchmarks/run.py evaluation
"""

import importlib.util
import time

import numpy as np
from rich.table import Table

from conddetr.engine.coco_metrics import LIBRARIES, Detections, coco_result
from harness.command import command
from harness.show import show
from harness.store import say_written, write

OBJECTS = 7
"""Per image, as in COCO."""
CLASSES = 80


def synthetic(images: int, per_image: int, seed: int = 0) -> tuple[dict, Detections]:
    """Random annotations in COCO's format, and detections near them, right and wrong."""
    rng = np.random.default_rng(seed)
    boxes = np.concatenate(
        [rng.uniform(0, 500, (images * OBJECTS, 2)), np.exp(rng.uniform(2, 5.5, (images * OBJECTS, 2)))], axis=1
    )
    categories = rng.integers(1, CLASSES + 1, len(boxes))
    truth = {
        "images": [{"id": index, "height": 640, "width": 640} for index in range(images)],
        "annotations": [
            {
                "id": index + 1,
                "image_id": index // OBJECTS,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for index, (box, category) in enumerate(zip(boxes.tolist(), categories.tolist(), strict=True))
        ],
        "categories": [{"id": index, "name": str(index)} for index in range(1, CLASSES + 1)],
    }
    image_ids = np.arange(images).repeat(per_image)
    near = image_ids * OBJECTS + rng.integers(0, OBJECTS, len(image_ids))
    detected = boxes[near]
    detected[:, :2] += rng.normal(0, 0.1, (len(near), 2)) * detected[:, 2:]
    right = rng.random(len(near)) < 0.3
    labels = np.where(right, categories[near], rng.integers(1, CLASSES + 1, len(near)))
    scores = rng.random(len(near)) * np.where(right, 1, 0.5)
    return truth, Detections(image_ids, labels, detected.astype(np.float32), scores.astype(np.float32))


def main(words: list[str]) -> None:
    """Time the libraries in turn, check that they agree, print, and write the raw samples."""
    parser = command("evaluation", __doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(words)
    libraries = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    truth, detections = synthetic(options.images, 100)
    samples: dict[str, list[float]] = {name: [] for name in libraries}
    expected: dict[str, float] | None = None
    for name in options.rounds * libraries:
        start = time.perf_counter()
        metrics = coco_result(truth, detections, name).metrics
        samples[name].append(time.perf_counter() - start)
        expected = expected or metrics
        # The time of a library with wrong metrics is meaningless.
        np.testing.assert_allclose(list(metrics.values()), list(expected.values()), atol=1e-12)
    table = Table(title=f"COCO metrics of {options.images} images × 100 detections, seconds")
    for column in ("library", "median", "fastest", "slowest", "AP"):
        table.add_column(column)
    for name, seconds in samples.items():
        figures = (np.median(seconds), min(seconds), max(seconds))
        table.add_row(name, *(f"{value:.2f}" for value in figures), f"{100 * expected['AP']:.2f}")
    show(table)
    settings = {"images": options.images, "detections": 100, "rounds": options.rounds}
    say_written(write("evaluation", {"settings": settings, "results": samples}))
