"""Data sets in COCO's format: a folder of images with an annotation file."""

import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_dtype

from conddetr.data.annotations import Annotations, read_annotations
from conddetr.data.boxes import box_readings, reaches_out
from conddetr.data.images import image_sizes, read_reduced, to_model_input
from conddetr.data.layouts import Layout, find_layout
from conddetr.data.names import find_image
from conddetr.data.transforms import EvalTransform, Plan, TrainTransform, apply, augmentation_generator

log = logging.getLogger(__name__)


class CocoDetection(Dataset):
    """Images with boxes from a COCO annotation file.

    Category ids are remapped to contiguous labels in the order of their ids; `classes` holds the mapping.
    Crowd boxes are not trained on (as in the official code). Boxes reaching out of the image are clipped;
    those that keep no area are left out and counted in `dropped_boxes`.

    Boxes are in pixels of the upright image, as labelling tools show it: turned by its EXIF tag. Where the annotations
    give an image the size that it has as stored, and its boxes fit into that alone, it is taken as stored.
    """

    endless = False

    def __init__(
        self,
        image_dir: str | Path,
        annotations: str | Path | Annotations,
        transform: TrainTransform | EvalTransform,
        image_ids: Collection[int] | None = None,
    ) -> None:
        """Read and check the annotations.

        Args:
            image_dir: folder of the images.
            annotations: a file in COCO's format, or what was read from one. Evaluation takes also a file without the
                list `annotations`, as that of a test set.
            transform: what happens to each image.
            image_ids: the images to use; default: all.

        Raises:
            FileNotFoundError: no such folder or file, or the first image is not there.
            ValueError: the annotations do not follow COCO's format, or lack an image that was asked for; names the
                file and the entry.
        """
        self.image_dir = Path(image_dir)
        if self.image_dir.is_file():
            raise NotADirectoryError(f"Image folder {self.image_dir} is a file.")
        if not self.image_dir.is_dir():
            raise FileNotFoundError(f"Image folder {self.image_dir} does not exist.")
        self.transform = transform
        if not isinstance(annotations, Annotations):
            annotations = read_annotations(annotations, needs_boxes=isinstance(transform, TrainTransform))
        self.annotation_file = annotations.source
        order = np.argsort(annotations.image_ids, kind="stable")
        if image_ids is not None:
            order = order[np.isin(annotations.image_ids[order], np.fromiter(image_ids, np.int64, len(image_ids)))]
            absent = set(image_ids) - set(annotations.image_ids[order].tolist())
            if absent:
                raise ValueError(f"Annotation file {self.annotation_file} has no image id {min(absent)}.")
        self._of_file = len(annotations)
        self._annotations = annotations.select(order)
        self.classes = sorted(annotations.categories, key=lambda category: category["id"])
        place = {category["id"]: label for label, category in enumerate(self.classes)}
        self._labels = np.array([place[category["id"]] for category in annotations.categories], np.int64)
        self._offsets = self._annotations.offsets
        self._complete_sizes()
        self._count_boxes()

    def __len__(self) -> int:
        return len(self._annotations)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        """The normalised image and its target, as the first epoch of seed 0 shows them; see `load`."""
        image, target = self.load(index, self.plan(index, augmentation_generator(0, 0, index)))
        return to_model_input(image), target

    @property
    def image_ids(self) -> list[int]:
        """Of all images, ascending."""
        return self._annotations.image_ids.tolist()

    @property
    def source(self) -> str:
        """The annotation file, and how many of its images these are where they are not all; for tables."""
        part = f"{len(self)} of the {self._of_file} images of " if len(self) < self._of_file else ""
        return f"{part}{self.annotation_file}"

    def describe(self) -> str:
        """What there is to train on, in one line."""
        counts = [f"{len(self)} images", f"{self.objects} objects of {len(self.classes)} classes"]
        counts += [f"{self.crowds} crowds, which are not trained on"] if self.crowds else []
        counts += [f"{self.dropped_boxes} boxes left out"] if self.dropped_boxes else []
        return f"{self.source}: {', '.join(counts)}"

    @property
    def is_annotated(self) -> bool:
        """Whether there are annotations to compare detections with."""
        return self._annotations.is_annotated

    def path(self, index: int) -> Path:
        """The file of an image; errors as `find_image`."""
        return find_image(self.image_dir, self._annotations.names[index])

    def files(self) -> Iterator[str]:
        """Where all images are as the annotations name them, as absolute paths; nothing is looked up."""
        folder = self.image_dir.resolve()
        return (os.path.join(folder, name) for name in self._annotations.names)

    def plan(self, index: int, generator: Random) -> Plan:
        """Draw what happens to an image; nothing is read."""
        return self.transform.plan(*self._annotations.sizes[index].tolist(), generator)

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
        image = self._read(index, plan)
        height, width = self._annotations.sizes[index].tolist()
        of_image = slice(*self._offsets[index : index + 2].tolist())
        boxes = _clipped(self._annotations.boxes[of_image], height, width)
        keep = _has_area(boxes) & ~self._annotations.crowds[of_image]
        # Boxes are in pixels of the file, the image may have been reduced.
        ratio = torch.tensor([image.shape[-1] / width, image.shape[-2] / height], dtype=torch.float32).repeat(2)
        target = {
            "labels": torch.from_numpy(self._labels[self._annotations.category_of[of_image][keep]]),
            "boxes": torch.from_numpy(boxes[keep].astype(np.float32)) * ratio,
            "image_id": int(self._annotations.image_ids[index]),
            "original_size": (height, width),
        }
        return apply(image, target, plan)

    def ground_truth(self) -> dict:
        """The annotations of these images in COCO's format, for evaluation."""
        return self._annotations.to_coco()

    def _complete_sizes(self) -> None:
        """Read from the images what the annotations do not say of their sizes."""
        sizes = self._annotations.sizes
        unknown = np.flatnonzero((sizes == 0).any(1))
        for index in unknown.tolist():
            sizes[index] = image_sizes(self._named(index)).upright
        if len(unknown):
            log.warning(
                "%s: %d of %d images have no height and width there: they are read from the images.",
                self.annotation_file,
                len(unknown),
                len(self),
            )
        if len(self):
            # Names that fit no file should be known now, not after the first batches are planned.
            self._named(0)

    def _count_boxes(self) -> None:
        """Boxes to train on, crowds, and boxes that are left out."""
        sizes = self._annotations.sizes[self._annotations.image_of]
        has_area = _has_area(_clipped(self._annotations.boxes, sizes[:, 0], sizes[:, 1]))
        crowds = self._annotations.crowds
        self.crowds = int(crowds.sum())
        self.dropped_boxes = int((~has_area & ~crowds).sum())
        self.objects = int((has_area & ~crowds).sum())
        readings = box_readings(self._annotations.boxes, sizes)
        if readings:
            log.warning(
                "%s: %s. Boxes must be x, y, width, height in pixels: conddetr validate-data shows which are not.",
                self.annotation_file,
                " and ".join(f"{len(reading.positions)} boxes look like {reading.kind}" for reading in readings),
            )
        if self.dropped_boxes:
            log.warning(
                "%s: %d boxes without area inside their image are left out.", self.annotation_file, self.dropped_boxes
            )

    def _named(self, index: int) -> Path:
        """`path`, with the image's id in what it raises."""
        try:
            return self.path(index)
        except (ValueError, OSError) as error:
            raise type(error)(f"{error}{self._place(index)}") from error

    def _place(self, index: int) -> str:
        return f" It is image id {self._annotations.image_ids[index]} of {self.annotation_file}."

    def _read(self, index: int, plan: Plan) -> Tensor:
        """The image as uint8, whole or reduced as far as the transform allows for this plan."""
        path = self._named(index)
        expected = tuple(self._annotations.sizes[index].tolist())
        # Asked for its own size, a file is decoded whole.
        target = plan.first_size() if self.transform.reduced_decoding else expected
        try:
            image, size = read_reduced(path, *target)
            if size != expected:
                self._check_stored(index, path, size)
                image, _ = read_reduced(path, *target, upright=False)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{error}{self._place(index)}") from error
        return to_dtype(image, torch.uint8, scale=True)

    def _check_stored(self, index: int, path: Path, upright: tuple[int, int]) -> None:
        """Raise a ValueError unless the annotations can only mean the image as stored, not as its EXIF tag turns it."""
        stored = tuple(self._annotations.sizes[index].tolist())
        boxes = self._annotations.boxes[slice(*self._offsets[index : index + 2].tolist())]
        fault = stored_fault(boxes, stored, upright, image_sizes(path).stored)
        if fault:
            raise ValueError(
                f"Image file {path}: the annotations say height × width {stored[0]}×{stored[1]}, the file, upright, "
                f"has {upright[0]}×{upright[1]}. {fault}"
            )


def stored_fault(
    boxes: np.ndarray, said: tuple[int, int], upright: tuple[int, int], stored: tuple[int, int]
) -> str | None:
    """Why annotations that give an image another size than it has upright cannot be used; None: they are of the image
    as stored.

    Args:
        boxes: [n, 4] xywh in pixels.
        said, upright, stored: (height, width) by the annotations; of the file turned by its EXIF tag, and not turned.
    """
    if said != stored:
        return "Boxes would be off: correct the annotations, or put the right file there."
    fits = {name: _fit(boxes, size) for name, size in (("stored", stored), ("upright", upright))}
    if len(boxes) and (fits["upright"] or not fits["stored"]):
        inside = "both ways" if all(fits.values()) else "upright only" if fits["upright"] else "neither way"
        return (
            f"That is its size as stored, before its EXIF tag turns it, and its boxes fit {inside}: which is meant? "
            "Write the upright size, or save the image without the tag."
        )
    return None


def _fit(boxes: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether no box reaches out of the image by more than the rounding of many tools."""
    return not reaches_out(boxes, np.array([size])).any()


def load_annotations(path: str | Path) -> dict:
    """`read_annotations` as lists and dicts in COCO's format, `area` and `iscrowd` filled in; errors as there."""
    return read_annotations(path).to_coco()


def coco_split(root: str | Path, split: str, transform: TrainTransform | EvalTransform) -> CocoDetection:
    """`train` or `val` of a folder in COCO's official 2017 layout; errors as `coco_files` and `CocoDetection`."""
    return CocoDetection(*coco_files(root, split), transform)


def coco_files(root: str | Path, split: str) -> tuple[Path, Path]:
    """Folder of images and annotation file of `train` or `val` in COCO's 2017 layout; they need not be there.

    Raises:
        ValueError: the folder has another layout, which is named.
    """
    root = Path(root)
    images, annotations = root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"
    if root.is_dir() and not images.is_dir():
        raise ValueError(
            f"Folder {root} is not in COCO's 2017 layout: expected {images.name}/ and annotations/{annotations.name}. "
            f"{_found_instead(root)}"
        )
    return images, annotations


def _found_instead(root: Path) -> str:
    try:
        layout = find_layout(root)
    except ValueError as error:
        return str(error)
    if layout.name == "COCO 2017":
        return f"It has {', '.join(layout.splits)} alone; --images and --annotations take any folder and file."
    return f"It is in that of {layout.name} ({layout.marker}): --dataset {root} reads it."


def layout_split(
    layout: Layout, split: str, transform: TrainTransform | EvalTransform, val_fraction: float
) -> CocoDetection:
    """One part of a data set whose layout was found.

    Args:
        layout: from `find_layout`.
        split: `train`, `val` or `test`. Where there is no `val`, a part of `train` is set aside for it.
        transform: what happens to each image.
        val_fraction: the size of that part.

    Raises:
        FileNotFoundError, ValueError: there is no such part, or as `CocoDetection`.
    """
    is_divided = "val" not in layout.splits and split in ("train", "val")
    source = layout.splits.get("train" if is_divided else split)
    if source is None:
        raise ValueError(f"{layout.root} has no images for {split}: {layout.describe()}.")
    annotations = source.read()
    ids = divided(annotations, val_fraction)[split == "val"] if is_divided else None
    return CocoDetection(source.images, annotations, transform, ids)


def layout_sets(
    layout: Layout, train_transform: TrainTransform, eval_transform: EvalTransform, val_fraction: float
) -> tuple[CocoDetection, CocoDetection]:
    """Training and validation set of a data set whose layout was found; arguments and errors as `layout_split`."""
    if "val" in layout.splits or "train" not in layout.splits:
        return (
            layout_split(layout, "train", train_transform, val_fraction),
            layout_split(layout, "val", eval_transform, val_fraction),
        )
    source = layout.splits["train"]
    return _divided_sets(source.images, source.read(), train_transform, eval_transform, val_fraction)


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
        val_images: folder of the images of `val_annotations`; default: `images`.
        val_annotations: a file of their own; nothing is set aside then.

    Raises:
        ValueError: `val_fraction` is not between 0 and 1, fewer than two images to divide, or as `CocoDetection`.
        FileNotFoundError: no such folder or file.
    """
    if val_annotations:
        return (
            CocoDetection(images, annotations, train_transform),
            CocoDetection(val_images or images, val_annotations, eval_transform),
        )
    return _divided_sets(images, read_annotations(annotations), train_transform, eval_transform, val_fraction)


def _divided_sets(
    images: str | Path,
    annotations: Annotations,
    train_transform: TrainTransform,
    eval_transform: EvalTransform,
    val_fraction: float,
) -> tuple[CocoDetection, CocoDetection]:
    """Both sets of annotations that are read once."""
    train_ids, val_ids = divided(annotations, val_fraction)
    return (
        CocoDetection(images, annotations, train_transform, train_ids),
        CocoDetection(images, annotations, eval_transform, val_ids),
    )


def divided(annotations: Annotations, val_fraction: float) -> tuple[list[int], list[int]]:
    """Ids of the images to train on, and of those that are set aside for validation.

    Raises:
        ValueError: `val_fraction` is not between 0 and 1, or fewer than two images to divide.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction: expected a value between 0 and 1, got {val_fraction}.")
    ids = sorted(annotations.image_ids.tolist())
    if len(ids) < 2:
        raise ValueError(f"Annotation file {annotations.source}: expected at least 2 images to divide, got {len(ids)}.")
    # In the order of random numbers that belong to the ids: an image added later moves hardly any other.
    ids.sort(key=lambda image_id: Random(image_id).random())
    count = min(max(1, round(val_fraction * len(ids))), len(ids) - 1)
    return ids[count:], ids[:count]


def _clipped(boxes: np.ndarray, height: int | np.ndarray, width: int | np.ndarray) -> np.ndarray:
    """[n, 4] xywh -> xyxy inside images of one size, or of n sizes."""
    x, y, w, h = boxes.T
    return np.stack([np.maximum(x, 0), np.maximum(y, 0), np.minimum(x + w, width), np.minimum(y + h, height)], axis=-1)


def _has_area(boxes: np.ndarray) -> np.ndarray:
    """[n, 4] xyxy -> [n] bool."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1)
