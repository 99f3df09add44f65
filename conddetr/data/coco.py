"""Data sets in COCO's layout: `<root>/<split>2017/*.jpg`, `<root>/annotations/instances_<split>2017.json`."""

import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from conddetr.data.images import read_image

log = logging.getLogger(__name__)

_REQUIRED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "bbox", "category_id"),
    "categories": ("id", "name"),
}


class CocoDetection(Dataset):
    """Images with boxes from a COCO annotation file.

    Category ids are remapped to contiguous labels in the order of their ids; `classes` holds the mapping.
    Crowd boxes are not trained on (as in the official code). Boxes reaching out of the image are clipped;
    those that keep no area are left out and counted in `dropped_boxes`.
    """

    def __init__(
        self, image_dir: str | Path, annotation_file: str | Path, transform: Callable[[Tensor, dict], tuple]
    ) -> None:
        """Read and check the annotations.

        Args:
            image_dir: folder of the images.
            annotation_file: JSON in COCO's format.
            transform: called with the image [3, H, W] and the target; a `TrainTransform` or `EvalTransform`.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: the annotations do not follow COCO's format; names the file and the entry.
        """
        self.image_dir, self.annotation_file = Path(image_dir), Path(annotation_file)
        if not self.image_dir.is_dir():
            raise FileNotFoundError(f"Image folder {self.image_dir} does not exist.")
        self.transform = transform
        self.content = load_annotations(self.annotation_file)
        self.classes = [
            {"id": category["id"], "name": category["name"]}
            for category in sorted(self.content["categories"], key=lambda category: category["id"])
        ]
        self._label_of = {category["id"]: label for label, category in enumerate(self.classes)}
        self._images = {image["id"]: image for image in self.content["images"]}
        self.image_ids = sorted(self._images)
        self._targets, self.dropped_boxes = self._make_targets()
        if self.dropped_boxes:
            log.warning(
                "%s: %d boxes without area inside their image are left out.",
                self.annotation_file,
                self.dropped_boxes,
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        """The transformed image and its target: `labels` [n], `boxes` [n, 4], `image_id`, `original_size`."""
        image_id = self.image_ids[index]
        image, info = self._read(image_id), self._images[image_id]
        if tuple(image.shape[-2:]) != (info["height"], info["width"]):
            raise ValueError(
                f"Image file {self.image_dir / info['file_name']} (image id {image_id}): {self.annotation_file} "
                f"says height × width {info['height']}×{info['width']}, the file, turned upright by its EXIF tag, has "
                f"{image.shape[1]}×{image.shape[2]}."
            )
        labels, boxes = self._targets[image_id]
        return self.transform(
            image,
            {
                "labels": labels,
                "boxes": boxes,
                "image_id": image_id,
                "original_size": (info["height"], info["width"]),
            },
        )

    def ground_truth(self) -> dict:
        """The annotations in COCO's format, for evaluation."""
        return self.content

    def _read(self, image_id: int) -> Tensor:
        try:
            return read_image(self.image_dir / self._images[image_id]["file_name"])
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{error} It is image id {image_id} of {self.annotation_file}.") from error

    def _make_targets(self) -> tuple[dict[int, tuple[Tensor, Tensor]], int]:
        annotations = defaultdict(list)
        for annotation in self.content["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        targets, dropped = {}, 0
        for image_id, info in self._images.items():
            kept = []
            for annotation in annotations[image_id]:
                if annotation["iscrowd"]:
                    continue
                box = _clipped_box(annotation["bbox"], info["height"], info["width"])
                if box is None:
                    dropped += 1
                else:
                    kept.append((self._label_of[annotation["category_id"]], box))
            targets[image_id] = (
                torch.tensor([label for label, _ in kept], dtype=torch.int64),
                torch.tensor([box for _, box in kept], dtype=torch.float32).reshape(-1, 4),
            )
        return targets, dropped


def coco_split(root: str | Path, split: str, transform: Callable[[Tensor, dict], tuple]) -> CocoDetection:
    """`train` or `val` of a folder in COCO's official 2017 layout; errors as `CocoDetection`."""
    root = Path(root)
    return CocoDetection(root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json", transform)


def load_annotations(path: Path) -> dict:
    """Read a COCO annotation file and check what the detector relies on.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON or not in COCO's format; names the file, the entry, and what was found.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Annotation file {path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Annotation file {path} is not JSON: {error}.") from error
    _check_annotations(path, content)
    for annotation in content["annotations"]:
        # Evaluation needs them, and files from other tools often lack them.
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return content


def _check_annotations(path: Path, content: dict) -> None:
    for section, keys in _REQUIRED.items():
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise ValueError(f"Annotation file {path}: expected a list under the key {section!r}.")
        for position, entry in enumerate(content[section]):
            absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if absent:
                raise ValueError(f"Annotation file {path}: {section}[{position}] has no {absent[0]!r}.")
        repeated = [key for key, count in Counter(entry["id"] for entry in content[section]).items() if count > 1]
        if repeated:
            raise ValueError(f"Annotation file {path}: id {repeated[0]} stands more than once in {section!r}.")
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        where = f"Annotation file {path}: annotation id {annotation['id']}"
        if annotation["category_id"] not in categories:
            raise ValueError(f"{where} has category_id {annotation['category_id']}, which is not in 'categories'.")
        if annotation["image_id"] not in images:
            raise ValueError(f"{where} has image_id {annotation['image_id']}, which is not in 'images'.")
        box = annotation["bbox"]
        if not (
            isinstance(box, list)
            and len(box) == 4
            and all(isinstance(value, (int, float)) and math.isfinite(value) for value in box)
        ):
            raise ValueError(f"{where} (image id {annotation['image_id']}): bbox must be 4 finite numbers, got {box}.")


def _clipped_box(bbox: list[float], height: int, width: int) -> list[float] | None:
    """xywh -> xyxy inside the image, or None where no area is left."""
    x, y, w, h = bbox
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    return [x0, y0, x1, y1] if x1 > x0 and y1 > y0 else None
