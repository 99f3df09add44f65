"""Detections for tests: equal to annotations, or random ones that match some of them."""

import numpy as np

from conddetr.engine.coco_metrics import Detections


def from_annotations(annotations, score=0.9):
    """Detections equal to the annotations."""
    return Detections(
        np.array([a["image_id"] for a in annotations], np.int64),
        np.array([a["category_id"] for a in annotations], np.int64),
        np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4),
        np.full(len(annotations), score, np.float32),
    )


def noisy(images, per_image, classes, seed=0):
    """Random annotations in COCO's format, some of them crowds, and detections that match some of them."""
    rng = np.random.default_rng(seed)
    count = images * 8
    boxes = np.concatenate([rng.uniform(0, 500, (count, 2)), np.exp(rng.uniform(1.5, 5.5, (count, 2)))], 1)
    annotations = [
        {
            "id": index + 1,
            "image_id": 7 * (index // 8),
            "category_id": int(rng.integers(1, classes + 1)),
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(rng.random() < 0.02),
        }
        for index, box in enumerate(boxes.tolist())
    ]
    truth = {
        "images": [{"id": 7 * index, "height": 800, "width": 800} for index in range(images)],
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": f"class {index}"} for index in range(classes + 1)],
    }
    indices = rng.integers(0, 8, (images, per_image)) + 8 * np.arange(images)[:, None]
    chosen = [annotations[index] for index in indices.flatten().tolist()]
    detections = from_annotations(chosen)
    size = detections.boxes[:, 2:].copy()
    detections.boxes[:, :2] += rng.normal(0, 0.05, size.shape) * size
    detections.boxes[:, 2:] *= np.exp(rng.normal(0, 0.05, size.shape))
    wrong = rng.random(len(detections)) < 0.3
    detections.category_ids[wrong] = rng.integers(1, classes + 3, wrong.sum())
    detections.scores = (rng.random(len(detections)) * np.where(wrong, 0.6, 1)).astype(np.float32)
    return truth, detections
