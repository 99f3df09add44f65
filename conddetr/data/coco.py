"""Data sets in COCO's layout: `<root>/<split>2017/*.jpg`, `<root>/annotations/instances_<split>2017.json`."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_dtype

from conddetr.data.images import read_reduced, to_model_input
from conddetr.data.transforms import EvalTransform, Plan, TrainTransform, apply, augmentation_generator

log = logging.getLogger(__name__)

_LIMIT = 2**31


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -_LIMIT < value < _LIMIT


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    # NaN fails both comparisons, and integers of any length can be compared.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LIMIT < value < _LIMIT


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (_is_id, "an integer ≥ 0"),
    "image_id": (_is_id, "an integer ≥ 0"),
    "category_id": (_is_id, "an integer ≥ 0"),
    # A null byte is in no file name.
    "file_name": (lambda value: isinstance(value, str) and value != "" and "\0" not in value, "a file name"),
    "name": (lambda value: isinstance(value, str), "a text"),
    "height": (lambda value: _is_integer(value) and value > 0, "a positive integer"),
    "width": (lambda value: _is_integer(value) and value > 0, "a positive integer"),
    "bbox": (_is_box, "4 finite numbers"),
    "area": (_is_number, "a finite number"),
    "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
}
"""What a value of each field must be, as (check, description)."""

FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "bbox", "category_id"),
    "categories": ("id", "name"),
}
"""The lists of an annotation file, and the fields that their entries must have."""


def entry_fault(section: str, entry: Any) -> str | None:
    """What is wrong with one entry of a list of `FIELDS`, or None."""
    if not isinstance(entry, dict):
        return f"expected an object, got {type(entry).__name__}"
    absent = [name for name in FIELDS[section] if name not in entry]
    if absent:
        return f"has no {absent[0]!r}"
    optional = ("area", "iscrowd") if section == "annotations" else ()
    for name in (*FIELDS[section], *(name for name in optional if name in entry)):
        is_valid, expected = _CHECKS[name]
        if not is_valid(entry[name]):
            return f"{name}: expected {expected}, got {str(entry[name])[:60]}"
    return None


class CocoDetection(Dataset):
    """Images with boxes from a COCO annotation file.

    Category ids are remapped to contiguous labels in the order of their ids; `classes` holds the mapping.
    Crowd boxes are not trained on (as in the official code). Boxes reaching out of the image are clipped;
    those that keep no area are left out and counted in `dropped_boxes`.
    """

    endless = False

    def __init__(
        self,
        image_dir: str | Path,
        annotation_file: str | Path,
        transform: TrainTransform | EvalTransform,
        image_ids: Collection[int] | None = None,
    ) -> None:
        """Read and check the annotations.

        Args:
            image_dir: folder of the images.
            annotation_file: JSON in COCO's format.
            transform: what happens to each image.
            image_ids: the images to use; default: all.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: the annotations do not follow COCO's format, or lack an image that was asked for; names the
                file and the entry.
        """
        self.image_dir, self.annotation_file = Path(image_dir), Path(annotation_file)
        if not self.image_dir.is_dir():
            raise FileNotFoundError(f"Image folder {self.image_dir} does not exist.")
        self.transform = transform
        content = load_annotations(self.annotation_file)
        self.classes = [
            {"id": category["id"], "name": category["name"]}
            for category in sorted(content["categories"], key=lambda category: category["id"])
        ]
        images = {image["id"]: image for image in content["images"]}
        self.image_ids = sorted(images if image_ids is None else image_ids)
        absent = [image_id for image_id in self.image_ids if image_id not in images]
        if absent:
            raise ValueError(f"Annotation file {self.annotation_file} has no image id {absent[0]}.")
        self._files = [images[image_id]["file_name"] for image_id in self.image_ids]
        self._sizes = torch.tensor([(images[i]["height"], images[i]["width"]) for i in self.image_ids]).reshape(-1, 2)
        self._pack_targets(content["annotations"])
        if self.dropped_boxes:
            log.warning(
                "%s: %d boxes without area inside their image are left out.",
                self.annotation_file,
                self.dropped_boxes,
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        """The normalised image and its target, as the first epoch of seed 0 shows them; see `load`."""
        image, target = self.load(index, self.plan(index, augmentation_generator(0, 0, index)))
        return to_model_input(image), target

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.image_dir / self._files[index]

    def plan(self, index: int, generator: Random) -> Plan:
        """Draw what happens to an image; nothing is read."""
        return self.transform.plan(*self._sizes[index].tolist(), generator)

    def largest_shape(self) -> tuple[int, int]:
        """Short and long side, in pixels, that no planned image exceeds."""
        return self.transform.largest_shape()

    def load(self, index: int, plan: Plan) -> tuple[Tensor, dict]:
        """Read an image and carry a plan out.

        Returns:
            [3, plan.height, plan.width] uint8, and the target: `labels` [n] int64, `boxes` [n, 4] cxcywh in [0, 1],
            `image_id`, `original_size` (height, width).

        Raises:
            FileNotFoundError, ValueError: the image is missing, damaged, or not of the size that the annotations
                say; names the file and the image id.
        """
        image, image_id = self._read(index, plan), self.image_ids[index]
        height, width = self._sizes[index].tolist()
        start, end = self._offsets[index : index + 2].tolist()
        # Boxes are in pixels of the file, the image may have been reduced.
        ratio = torch.tensor([image.shape[-1] / width, image.shape[-2] / height], dtype=torch.float32).repeat(2)
        target = {
            "labels": self._labels[start:end],
            "boxes": self._boxes[start:end] * ratio,
            "image_id": image_id,
            "original_size": (height, width),
        }
        return apply(image, target, plan)

    def ground_truth(self) -> dict:
        """The annotations of these images in COCO's format, for evaluation; read from the file again.

        They are not kept: lists and dicts of a large set would be copied into every worker process, page by page.
        """
        content = load_annotations(self.annotation_file)
        chosen = set(self.image_ids)
        return {
            "images": [image for image in content["images"] if image["id"] in chosen],
            "annotations": [a for a in content["annotations"] if a["image_id"] in chosen],
            "categories": content["categories"],
        }

    def _read(self, index: int, plan: Plan) -> Tensor:
        """The image as uint8, whole or reduced as far as the transform allows for this plan."""
        path = self.path(index)
        expected = tuple(self._sizes[index].tolist())
        # Asked for its own size, a file is decoded whole.
        target = plan.first_size() if self.transform.reduced_decoding else expected
        try:
            image, size = read_reduced(path, *target)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{error} It is image id {self.image_ids[index]} of {self.annotation_file}.") from error
        if size != expected:
            raise ValueError(
                f"Image file {path} (image id {self.image_ids[index]}): {self.annotation_file} says height × width "
                f"{expected[0]}×{expected[1]}, the file, turned upright by its EXIF tag, has {size[0]}×{size[1]}."
            )
        return to_dtype(image, torch.uint8, scale=True)

    def _pack_targets(self, annotations: list[dict]) -> None:
        """Boxes of all images in one tensor [N, 4], those of image i from `_offsets[i]` to `_offsets[i + 1]`."""
        label_of = {category["id"]: label for label, category in enumerate(self.classes)}
        sizes = dict(zip(self.image_ids, self._sizes.tolist(), strict=True))
        kept: dict[int, list[tuple[int, list[float]]]] = {image_id: [] for image_id in self.image_ids}
        self.dropped_boxes = 0
        for annotation in annotations:
            image_id = annotation["image_id"]
            if annotation["iscrowd"] or image_id not in kept:
                continue
            box = _clipped_box(annotation["bbox"], *sizes[image_id])
            if box is None:
                self.dropped_boxes += 1
            else:
                kept[image_id].append((label_of[annotation["category_id"]], box))
        targets = [target for of_image in kept.values() for target in of_image]
        self._labels = torch.tensor([label for label, _ in targets], dtype=torch.int64)
        self._boxes = torch.tensor([box for _, box in targets], dtype=torch.float32).reshape(-1, 4)
        self._offsets = torch.tensor([0, *(len(of_image) for of_image in kept.values())]).cumsum(0)


def coco_split(root: str | Path, split: str, transform: TrainTransform | EvalTransform) -> CocoDetection:
    """`train` or `val` of a folder in COCO's official 2017 layout; errors as `CocoDetection`."""
    root = Path(root)
    return CocoDetection(root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json", transform)


def folder_sets(
    images: str | Path,
    annotations: str | Path,
    train_transform: TrainTransform,
    eval_transform: EvalTransform,
    val_fraction: float = 0.1,
    val_images: str | Path | None = None,
    val_annotations: str | Path | None = None,
) -> tuple[CocoDetection, CocoDetection]:
    """Training and validation set of any folder with images and one annotation file.

    Args:
        images: folder of the images.
        annotations: JSON in COCO's format.
        train_transform, eval_transform: what happens to the images of each set.
        val_fraction: of the images that are set aside for validation, at least one; always the same ones.
        val_images: folder of the validation images; default: `images`.
        val_annotations: a file of their own; nothing is set aside then.

    Raises:
        ValueError: `val_fraction` is not between 0 and 1, fewer than two images to divide, or as `CocoDetection`.
        FileNotFoundError: no such folder or file.
    """
    val_images = val_images or images
    if val_annotations:
        return (
            CocoDetection(images, annotations, train_transform),
            CocoDetection(val_images, val_annotations, eval_transform),
        )
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction: expected a value between 0 and 1, got {val_fraction}.")
    ids = sorted(image["id"] for image in load_annotations(Path(annotations))["images"])
    if len(ids) < 2:
        raise ValueError(f"Annotation file {annotations}: expected at least 2 images to divide, got {len(ids)}.")
    # In the order of random numbers that belong to the ids: an image added later moves hardly any other.
    ids.sort(key=lambda image_id: Random(image_id).random())
    count = min(max(1, round(val_fraction * len(ids))), len(ids) - 1)
    return (
        CocoDetection(images, annotations, train_transform, ids[count:]),
        CocoDetection(val_images, annotations, eval_transform, ids[:count]),
    )


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
    # A deeply nested file exhausts the parser's stack.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Annotation file {path} is not JSON: {error}.") from error
    _check_annotations(path, content)
    for annotation in content["annotations"]:
        # Evaluation needs them, and files from other tools often lack them.
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return content


def _check_annotations(path: Path, content: dict) -> None:
    for section in FIELDS:
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise ValueError(f"Annotation file {path}: expected a list under the key {section!r}.")
        for position, entry in enumerate(content[section]):
            fault = entry_fault(section, entry)
            if fault:
                raise ValueError(f"Annotation file {path}: {section}[{position}]{_id_of(entry)}: {fault}.")
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


def _id_of(entry: Any) -> str:
    return f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""


def _clipped_box(bbox: list[float], height: int, width: int) -> list[float] | None:
    """xywh -> xyxy inside the image, or None where no area is left."""
    x, y, w, h = bbox
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    return [x0, y0, x1, y1] if x1 > x0 and y1 > y0 else None
