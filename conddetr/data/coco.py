"""Data sets in COCO's format: a folder of images with an annotation file."""

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_dtype

from conddetr.config.augment import AugmentConfig
from conddetr.data.annotations import Annotations, read_annotations
from conddetr.data.augment.draws import integer
from conddetr.data.augment.plans import Mosaic, Plan
from conddetr.data.boxes import box_readings, stored_fault
from conddetr.data.encoded import EncodedJpeg, read_jpeg
from conddetr.data.images import image_sizes, read_reduced, to_model_input
from conddetr.data.layouts import Layout, find_layout
from conddetr.data.names import find_image
from conddetr.data.transforms import (
    EvalTransform,
    TrainTransform,
    augmentation_generator,
    transform_images,
    transform_targets,
)

log = logging.getLogger(__name__)


class CocoDetection(Dataset):
    """Images with boxes from a COCO annotation file.

    Category ids are remapped to contiguous labels in the order of their ids; `classes` holds the mapping.
    Training leaves crowds out (as the official code does). Boxes are clipped to the image; boxes that keep no area are
    left out and counted in `dropped_boxes`.

    Boxes are in pixels of the upright image, as labelling tools show it: turned by its EXIF tag. If the annotations
    give the size of the image as stored, and its boxes fit only there, the image is used as stored.
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
            annotations: a file in COCO's format, or the annotations from one. Evaluation also accepts a file without
                the list `annotations`, for example a test set's.
            transform: the transform of each image.
            image_ids: the images to use; default: all.

        Raises:
            FileNotFoundError: no such folder or file, or the first image is not there.
            ValueError: the annotations do not follow COCO's format, or lack a requested image; names the file and the
                entry.
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
            missing = set(image_ids) - set(annotations.image_ids[order].tolist())
            if missing:
                raise ValueError(f"Annotation file {self.annotation_file} has no image id {min(missing)}.")
        self._of_file = len(annotations)
        self._annotations = annotations.select(order)
        self.classes = sorted(annotations.categories, key=lambda category: category["id"])
        self._complete_sizes()
        self._find_objects()

    def __len__(self) -> int:
        return len(self._annotations)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        """The normalised image and its target, as in the first epoch with seed 0; see `load`."""
        image, target = self.load(index, self.plan(index, augmentation_generator(0, 0, index)))
        return to_model_input(image), target

    @property
    def image_ids(self) -> list[int]:
        """Ids of all images, ascending."""
        return self._annotations.image_ids.tolist()

    @property
    def source(self) -> str:
        """The annotation file, and for a part of it the number of its images; for tables."""
        part = f"{len(self)} of the {self._of_file} images of " if len(self) < self._of_file else ""
        return f"{part}{self.annotation_file}"

    def describe(self) -> str:
        """Numbers of images, objects, classes, crowds and omitted boxes, in one line."""
        counts = [f"{len(self)} images", f"{self.objects} objects of {len(self.classes)} classes"]
        counts += [f"{self.crowds} crowds, which are not trained on"] if self.crowds else []
        counts += [f"{self.dropped_boxes} boxes left out"] if self.dropped_boxes else []
        return f"{self.source}: {', '.join(counts)}"

    @property
    def is_annotated(self) -> bool:
        """Whether there are annotations to compare detections with."""
        return self._annotations.is_annotated

    def path(self, index: int) -> Path:
        """The file of an image; errors as in `find_image`."""
        return find_image(self.image_dir, self._annotations.names[index])

    def files(self) -> Iterator[str]:
        """Absolute paths of all images as the annotations name them; none is looked up."""
        folder = self.image_dir.resolve()
        return (os.path.join(folder, name) for name in self._annotations.names)

    @property
    def augment(self) -> AugmentConfig:
        """How the images are augmented."""
        return self.transform.augment

    def plan(self, index: int, generator: Random) -> Plan | Mosaic:
        """Sample the augmentation of an image; nothing is read."""
        augment = self.transform.augment
        if augment.mosaic and generator.random() < augment.mosaic:
            indices = [index, *(integer(0, len(self) - 1, generator) for _ in range(3))]
            mosaic = self.transform.plan_mosaic(indices, self._annotations.sizes[indices].tolist(), generator)
            if mosaic is not None:
                return mosaic
        boxes = self.objects_of(index)[0] if augment.crop == "keep-boxes" else None
        return self.transform.plan(*self._annotations.sizes[index].tolist(), generator, boxes)

    def whole_plan(self, index: int) -> Plan:
        """The plan that changes nothing of an image."""
        return Plan(False, None, *self._annotations.sizes[index].tolist())

    def objects_of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An image's objects to train on: boxes [n, 4] float64, xyxy in pixels of the image, and labels [n] int64."""
        rows = slice(*self._offsets[index : index + 2].tolist())
        return self._boxes[rows], self._labels[rows]

    def largest_shape(self) -> tuple[int, int]:
        """Short and long side, in pixels, that no planned image exceeds."""
        return self.transform.largest_shape()

    def load(self, index: int, plan: Plan | Mosaic) -> tuple[Tensor, dict]:
        """Read an image and apply a plan; for a mosaic, read its four images.

        Returns:
            [3, plan.height, plan.width] uint8, and the target: `labels` [n] int64, `boxes` [n, 4] cxcywh in [0, 1],
            `image_id`, `original_size` (height, width). The last two are those of the image with this index.

        Raises:
            FileNotFoundError, ValueError: the image is missing or damaged, or its size differs from the annotations';
                names the file and the image id.
        """
        images = [self._read(*part) for part in _parts(index, plan)]
        # The images may be decoded at reduced size.
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return transform_images(images, plan), self._target(index, plan, sizes)

    def load_encoded(self, index: int, plan: Plan | Mosaic) -> tuple[list[EncodedJpeg] | Tensor, dict]:
        """As `load`, but JPEG files are only read, for a device that decodes them and applies the plan.

        Returns:
            The file, or the four files of a mosaic, and the target. If one of them is another kind of file
            (`read_jpeg`), the image as from `load`.
        """
        files = []
        for source, _ in _parts(index, plan):
            file = self._read_encoded(source)
            if file is None:
                return self.load(index, plan)
            files.append(file)
        return files, self._target(index, plan, [self._size(source) for source, _ in _parts(index, plan)])

    def _size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return tuple(self._annotations.sizes[index].tolist())

    def _target(self, index: int, plan: Plan | Mosaic, sizes: Sequence[tuple[int, int]]) -> dict:
        """The target of a plan, as `load` returns it; `sizes` are those of the decoded images."""
        targets = []
        for (source, _), (height, width) in zip(_parts(index, plan), sizes, strict=True):
            original, (boxes, labels) = self._size(source), self.objects_of(source)
            ratio = torch.tensor([width / original[1], height / original[0]], dtype=torch.float32).repeat(2)
            targets.append(
                {
                    "labels": torch.tensor(labels),
                    "boxes": torch.from_numpy(boxes.astype(np.float32)) * ratio,
                    "image_id": int(self._annotations.image_ids[source]),
                    "original_size": original,
                }
            )
        return transform_targets(targets, sizes, plan)

    def ground_truth(self) -> dict:
        """The annotations of these images in COCO's format, for evaluation."""
        return self._annotations.to_coco()

    def _complete_sizes(self) -> None:
        """Read sizes that the annotations do not give from the images."""
        sizes = self._annotations.sizes
        unknown = np.flatnonzero((sizes == 0).any(1))
        for index in unknown.tolist():
            sizes[index] = image_sizes(self._named(index)).upright
        if len(unknown):
            log.warning(
                "%s: %d of %d images have no height and width: the sizes are read from the images.",
                self.annotation_file,
                len(unknown),
                len(self),
            )
        if len(self):
            # Wrong names should fail now, not after the first batches are planned.
            self._named(0)

    def _find_objects(self) -> None:
        """Find the objects to train on, count them, crowds and omitted boxes, and warn of doubtful boxes."""
        annotations = self._annotations
        sizes = annotations.sizes[annotations.image_of]
        boxes, crowds = _clipped(annotations.boxes, sizes[:, 0], sizes[:, 1]), annotations.crowds
        has_area = _has_area(boxes)
        is_object = has_area & ~crowds
        label_of = {category["id"]: label for label, category in enumerate(self.classes)}
        labels = np.array([label_of[category["id"]] for category in annotations.categories], np.int64)
        self._boxes, self._labels = boxes[is_object], labels[annotations.category_of[is_object]]
        self._offsets = np.concatenate([[0], np.cumsum(is_object)])[annotations.offsets]
        self.crowds = int(crowds.sum())
        self.dropped_boxes = int((~has_area & ~crowds).sum())
        self.objects = len(self._labels)
        readings = box_readings(self._annotations.boxes, sizes)
        if readings:
            log.warning(
                "%s: %s. Boxes must be x, y, width, height in pixels: conddetr validate-data lists the wrong ones.",
                self.annotation_file,
                " and ".join(f"{len(reading.positions)} boxes look like {reading.kind}" for reading in readings),
            )
        if self.dropped_boxes:
            log.warning(
                "%s: %d boxes without area inside their image are left out.", self.annotation_file, self.dropped_boxes
            )

    def _named(self, index: int) -> Path:
        """`path`, with the image's id in its errors."""
        try:
            return self.path(index)
        except (ValueError, OSError) as error:
            raise type(error)(f"{error}{self._image_note(index)}") from error

    def _image_note(self, index: int) -> str:
        return f" Its image id is {self._annotations.image_ids[index]} in {self.annotation_file}."

    @contextmanager
    def _image_noted(self, index: int) -> Iterator[None]:
        """Adds the image's id to errors of its file."""
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{error}{self._image_note(index)}") from error

    def _read(self, index: int, plan: Plan) -> Tensor:
        """The image as uint8, whole or as small as the transform allows for this plan."""
        path, expected = self._named(index), self._size(index)
        # With its own size as the target, a file is decoded whole.
        target = plan.first_size() if self.transform.reduced_decoding else expected
        with self._image_noted(index):
            image, size = read_reduced(path, *target)
            if size != expected:
                self._check_stored(index, path, size)
                image, _ = read_reduced(path, *target, upright=False)
        return to_dtype(image, torch.uint8, scale=True)

    def _read_encoded(self, index: int) -> EncodedJpeg | None:
        """The image's file; None: it is not a JPEG that every device decodes."""
        path = self._named(index)
        with self._image_noted(index):
            file = read_jpeg(path, self._image_note(index))
            if file is None or file.size == self._size(index):
                return file
            self._check_stored(index, path, file.size)
        return replace(file, orientation=1)

    def _check_stored(self, index: int, path: Path, upright: tuple[int, int]) -> None:
        """Raise a ValueError unless the annotations clearly refer to the image before its EXIF tag turns it."""
        stored = self._size(index)
        boxes = self._annotations.boxes[slice(*self._annotations.offsets[index : index + 2].tolist())]
        fault = stored_fault(boxes, stored, upright, image_sizes(path).stored)
        if fault:
            raise ValueError(
                f"Image file {path}: the annotations give height × width {stored[0]}×{stored[1]}, but the upright "
                f"image has {upright[0]}×{upright[1]}. {fault}"
            )


def load_annotations(path: str | Path) -> dict:
    """`read_annotations` as lists and dicts in COCO's format, with `area` and `iscrowd` filled in; same errors."""
    return read_annotations(path).to_coco()


def coco_split(root: str | Path, split: str, transform: TrainTransform | EvalTransform) -> CocoDetection:
    """`train` or `val` of a folder in COCO's 2017 layout; errors as in `coco_files` and `CocoDetection`."""
    return CocoDetection(*coco_files(root, split), transform)


def coco_files(root: str | Path, split: str) -> tuple[Path, Path]:
    """Folder of images and annotation file of `train` or `val` in COCO's 2017 layout; they need not exist.

    Raises:
        ValueError: the folder has another layout; names it.
    """
    root = Path(root)
    images, annotations = root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"
    if root.is_dir() and not images.is_dir():
        raise ValueError(
            f"Folder {root} is not in COCO's 2017 layout: expected {images.name}/ and annotations/{annotations.name}. "
            f"{_actual_layout(root)}"
        )
    return images, annotations


def _actual_layout(root: Path) -> str:
    try:
        layout = find_layout(root)
    except ValueError as error:
        return str(error)
    if layout.name == "COCO 2017":
        return f"It only has {', '.join(layout.splits)}; --images and --annotations take any folder and file."
    return f"It is in the layout of {layout.name} ({layout.marker}): --dataset {root} reads it."


def layout_split(
    layout: Layout, split: str, transform: TrainTransform | EvalTransform, val_fraction: float
) -> CocoDetection:
    """One split of a data set in a detected layout.

    Args:
        layout: from `find_layout`.
        split: `train`, `val` or `test`. If there is no `val`, a part of `train` is held out for it.
        transform: the transform of each image.
        val_fraction: the size of that part.

    Raises:
        FileNotFoundError, ValueError: there is no such split, or as in `CocoDetection`.
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
    """Training and validation set of a data set in a detected layout; arguments and errors as in `layout_split`."""
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
        train_transform, eval_transform: the transforms of the images of each set.
        val_fraction: fraction of the images to hold out for validation, at least one image; always the same images.
        val_images: folder of the images of `val_annotations`; default: `images`.
        val_annotations: a separate file for validation; then no image is held out.

    Raises:
        ValueError: `val_fraction` is not between 0 and 1, fewer than two images to divide, or as in `CocoDetection`.
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
    """Training and validation set from annotations that are read once."""
    train_ids, val_ids = divided(annotations, val_fraction)
    return (
        CocoDetection(images, annotations, train_transform, train_ids),
        CocoDetection(images, annotations, eval_transform, val_ids),
    )


def divided(annotations: Annotations, val_fraction: float) -> tuple[list[int], list[int]]:
    """Ids of the images for training, and of those held out for validation.

    Raises:
        ValueError: `val_fraction` is not between 0 and 1, or fewer than two images to divide.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction: expected a value between 0 and 1, got {val_fraction}.")
    ids = sorted(annotations.image_ids.tolist())
    if len(ids) < 2:
        raise ValueError(f"Annotation file {annotations.source}: expected at least 2 images to divide, got {len(ids)}.")
    # Each id has its own random number, so an image added later moves hardly any other.
    ids.sort(key=lambda image_id: Random(image_id).random())
    count = min(max(1, round(val_fraction * len(ids))), len(ids) - 1)
    return ids[count:], ids[:count]


def _parts(index: int, plan: Plan | Mosaic) -> list[tuple[int, Plan]]:
    """The images that a plan for image `index` reads, each with its own plan."""
    return list(zip(plan.indices, plan.tiles, strict=True)) if isinstance(plan, Mosaic) else [(index, plan)]


def _clipped(boxes: np.ndarray, height: int | np.ndarray, width: int | np.ndarray) -> np.ndarray:
    """[n, 4] xywh -> xyxy clipped to images of one size, or of n sizes."""
    x, y, w, h = boxes.T
    return np.stack([np.maximum(x, 0), np.maximum(y, 0), np.minimum(x + w, width), np.minimum(y + h, height)], axis=-1)


def _has_area(boxes: np.ndarray) -> np.ndarray:
    """Whether boxes have an area: [n, 4] xyxy -> [n] bool."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1)
