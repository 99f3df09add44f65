"""Training images as training sees them: augmented, at the size of the model's input, with their boxes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_convert

from conddetr.config.checks import check_least
from conddetr.data.augment.plans import Mosaic
from conddetr.data.coco import CocoDetection
from conddetr.data.images import to_model_input
from conddetr.data.synthetic import SyntheticShapes
from conddetr.data.transforms import augmentation_generator
from conddetr.viz.boxes import denormalize, draw_boxes
from conddetr.viz.pictures import PictureFolder

ROWS = 2
"""Rows of versions beside an image."""
SIDE = 3.2
"""Side of a version's cell, in inches."""


@dataclass(frozen=True)
class LabelledImage:
    """An image with its objects."""

    image: Tensor
    """[3, H, W] float32 RGB in [0, 1]."""
    boxes: Tensor
    """[n, 4] float32, xyxy in pixels."""
    labels: list[int]


@dataclass(frozen=True)
class Sample:
    """A training image, and what the first epochs of a training see of it."""

    index: int
    """Index in the training set."""
    original: LabelledImage
    """As in the file."""
    versions: list[LabelledImage]
    """In epoch 1, 2, …; empty for synthetic shapes, which no training sees twice."""
    dropped: int
    """Boxes of the images in the versions that are not in the versions, because augmentation dropped them."""


@dataclass
class Drawn:
    """What `draw_samples` drew."""

    files: list[Path]
    """One picture per image."""
    objects: int = 0
    """Boxes in the original images."""
    versions: int = 0
    """Augmented images."""
    version_objects: int = 0
    """Boxes in them."""
    dropped: int = 0
    """Boxes that augmentation dropped."""

    def describe(self) -> str:
        """The numbers, in one line."""
        folder = f"; wrote {len(self.files)} pictures to {self.files[0].parent}" if self.files else ""
        versions = (
            f"{self.versions} augmented versions with {self.version_objects} objects, {self.dropped} boxes dropped"
            if self.versions
            else "no augmented versions, because every synthetic image is new"
        )
        return f"{len(self.files)} images with {self.objects} objects, {versions}{folder}"


def samples(
    dataset: CocoDetection | SyntheticShapes, count: int = 8, versions: int = 6, seed: int = 42
) -> Iterator[Sample]:
    """Random training images, each with what the first epochs of a training with this seed see of it.

    Args:
        dataset: a training set.
        count: number of images, at most as many as there are.
        versions: number of epochs.
        seed: the training's seed; it also chooses the images.

    Raises:
        ValueError: `count` or `versions` below 1; an image is missing or damaged, see `CocoDetection.load`.
    """
    check_least("count", count, 1)
    check_least("versions", versions, 1)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return (_sample(dataset, index, versions, seed) for index in order[:count].tolist())


def _sample(dataset: CocoDetection | SyntheticShapes, index: int, versions: int, seed: int) -> Sample:
    original = _labelled(*dataset.load(index, dataset.whole_plan(index)))
    if isinstance(dataset, SyntheticShapes):
        return Sample(index, original, [], 0)
    plans = [dataset.plan(index, augmentation_generator(seed, epoch, index)) for epoch in range(versions)]
    sources = [source for plan in plans for source in (plan.indices if isinstance(plan, Mosaic) else [index])]
    seen = [_labelled(*dataset.load(index, plan)) for plan in plans]
    objects = sum(len(dataset.objects_of(source)[1]) for source in sources)
    return Sample(index, original, seen, objects - sum(len(version.labels) for version in seen))


def _labelled(image: Tensor, target: dict) -> LabelledImage:
    """A sample of a data set's `load`, through the model's normalisation and back."""
    height, width = image.shape[-2:]
    boxes = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
    return LabelledImage(denormalize(to_model_input(image)), boxes, target["labels"].tolist())


def sample_figure(sample: Sample, names: Sequence[str]) -> Figure:
    """The image at the left, and its versions beside it, each filling its cell; titles give height × width in pixels.

    Args:
        sample: from `samples`.
        names: of the classes, by label.
    """
    columns = math.ceil(len(sample.versions) / ROWS)
    figure = Figure(figsize=(SIDE * (ROWS + columns), SIDE * ROWS), layout="constrained")
    grid = figure.add_gridspec(ROWS, ROWS + columns)
    _draw(figure.add_subplot(grid[:, :ROWS]), sample.original, names, "image")
    for number, version in enumerate(sample.versions):
        row, column = divmod(number, columns)
        _draw(figure.add_subplot(grid[row, ROWS + column]), version, names, f"epoch {number + 1}")
    return figure


def _draw(axes: Axes, labelled: LabelledImage, names: Sequence[str], title: str) -> None:
    height, width = labelled.image.shape[-2:]
    captions = [names[label] for label in labelled.labels]
    draw_boxes(axes, labelled.image, labelled.boxes, labelled.labels, captions, f"{title}: {height}×{width}")


def draw_samples(
    dataset: CocoDetection | SyntheticShapes, folder: str | Path, count: int = 8, versions: int = 6, seed: int = 42
) -> Drawn:
    """Write a picture of each of the `samples` into a folder; arguments and errors as there.

    Pictures have their images' names, see `PictureFolder`; nothing else in the folder is replaced.

    Raises:
        NotADirectoryError: the folder is a file.
    """
    names = [str(category["name"]) for category in dataset.classes]
    pictures = PictureFolder(folder, "show-data", [])
    drawn = Drawn([])
    for sample in samples(dataset, count, versions, seed):
        path = Path(f"shapes-{sample.index}") if isinstance(dataset, SyntheticShapes) else dataset.path(sample.index)
        drawn.files.append(pictures.save(sample_figure(sample, names), path))
        drawn.objects += len(sample.original.labels)
        drawn.versions += len(sample.versions)
        drawn.version_objects += sum(len(version.labels) for version in sample.versions)
        drawn.dropped += sample.dropped
    return drawn
