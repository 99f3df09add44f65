"""Augmentation of training images, with their boxes.

The augmentation of an image is planned first, from its size and a generator alone, and applied later. So the shapes of
a whole epoch are known before an image is read, and a plan does not depend on the process that reads the image.

Source of `paper`: DETR section A.4; `make_coco_transforms` of `datasets/coco.py` in the official code. The other parts
are in `conddetr.data.augment`.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms.v2 import functional as F

from conddetr.config import ModelConfig
from conddetr.config.augment import AugmentConfig, AugmentSet
from conddetr.data.augment.colour import apply_colour, plan_colour
from conddetr.data.augment.crops import plan_crop, plan_jitter
from conddetr.data.augment.draws import choice, coin, integer
from conddetr.data.augment.mosaic import plan_mosaic
from conddetr.data.augment.plans import Crop, Mosaic, Plan
from conddetr.data.images import resized_shape

_REFERENCE_SIZE = 800
_SCALES = tuple(range(480, 801, 32))
_CROP_SCALES = (400, 500, 600)
_CROP_RANGE = (384, 600)
LEAST_SIDE = 1.0
"""Pixels. Large-scale jitter and mosaics drop smaller boxes, as torchvision's `SanitizeBoundingBoxes` does."""


class TrainTransform:
    """The augmentation of training images; `AugmentConfig` describes its parts.

    Sizes of the multi-scale resize and of the random crop are the official ones times `config.image_size` / 800.
    """

    reduced_decoding = True
    """JPEGs much larger than their target are decoded at 1/2, 1/4, 1/8; pixels differ slightly, see `read_reduced`."""

    def __init__(self, config: ModelConfig, augment: AugmentConfig | AugmentSet = "paper") -> None:
        """
        Args:
            config: the model's configuration, which gives the sizes.
            augment: what to do; the name of a set stands for the set.
        """
        self.augment = AugmentConfig(augment) if isinstance(augment, str) else augment
        factor = config.image_size / _REFERENCE_SIZE
        self.scales = [round(size * factor) for size in _SCALES]
        self.crop_scales = [round(size * factor) for size in _CROP_SCALES]
        self.crop_range = [round(size * factor) for size in _CROP_RANGE]
        self.short_side, self.max_size = config.image_size, config.max_image_size

    def plan(self, height: int, width: int, generator: random.Random, boxes: np.ndarray | None = None) -> Plan:
        """Sample the augmentation of an image of this size.

        Args:
            height, width: of the image, in pixels.
            generator: the source of all choices.
            boxes: [n, 4] xyxy in pixels of the image. Only crops that keep boxes need them.

        Raises:
            ValueError: the boxes are needed and not given.
        """
        augment = self.augment
        flip = augment.flip and coin(generator)
        if augment.crop != "keep-boxes":
            boxes = np.empty((0, 4))
        elif boxes is None:
            raise ValueError("boxes: crops that keep boxes need them, got None.")
        elif flip:
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        crop = self._plan_crop(height, width, boxes, generator)
        size = self._plan_size(*((height, width) if crop is None else (crop.rows, crop.columns)), generator)
        least_side = 0.0
        if augment.resize == "large-scale-jitter":
            least_side = LEAST_SIDE
            whole = Crop(height, width, 0, 0, height, width, resizes=False, by_centre=augment.crop == "keep-boxes")
            part, *size = plan_jitter(crop or whole, size, boxes, generator)
            crop = None if part == whole else part
        return Plan(flip, crop, *size, plan_colour(generator) if augment.colour else None, least_side)

    def plan_mosaic(
        self, indices: Sequence[int], sizes: Sequence[tuple[int, int]], generator: random.Random
    ) -> Mosaic | None:
        """Sample a mosaic of four images of these sizes, as large as the first would be at scale 1; None: too small."""
        size = self._plan_size(*sizes[0], generator)
        if min(size) < 2:
            return None
        mosaic = plan_mosaic(indices, sizes, size, self.augment.flip, generator)
        return replace(mosaic, colour=plan_colour(generator)) if self.augment.colour else mosaic

    def __call__(self, image: Tensor, target: dict, generator: random.Random) -> tuple[Tensor, dict]:
        """Plan and apply; arguments and result as in `apply`.

        Raises:
            ValueError: mosaics are on, which need a data set.
        """
        if self.augment.mosaic:
            raise ValueError("A mosaic needs other images of a data set: call the data set's `plan` and `load`.")
        return apply(image, target, self.plan(*image.shape[-2:], generator, target["boxes"].double().numpy()))

    def largest_shape(self) -> tuple[int, int]:
        """Short and long side, in pixels, that no result exceeds."""
        return max(self.scales) if self.augment.resize == "multi-scale" else self.short_side, self.max_size

    def _plan_size(self, height: int, width: int, generator: random.Random) -> tuple[int, int]:
        """Height and width to which a part of an image is resized, before large-scale jitter."""
        short_side = choice(self.scales, generator) if self.augment.resize == "multi-scale" else self.short_side
        return resized_shape(height, width, short_side, self.max_size)

    def _plan_crop(self, height: int, width: int, boxes: np.ndarray, generator: random.Random) -> Crop | None:
        if self.augment.crop == "keep-boxes":
            return plan_crop(height, width, boxes, generator)
        is_cropped = self.augment.crop == "random" and coin(generator)
        return self._plan_random_crop(height, width, generator) if is_cropped else None

    def _plan_random_crop(self, height: int, width: int, generator: random.Random) -> Crop:
        short_side = choice(self.crop_scales, generator)
        # The first resize has no official bound; this one keeps a 1×2000 strip from a side of a million pixels.
        resized = resized_shape(height, width, short_side, 8 * short_side)
        low, high = self.crop_range
        rows, columns = (integer(min(low, side), min(side, high), generator) for side in resized)
        top = integer(0, resized[0] - rows, generator)
        left = integer(0, resized[1] - columns, generator)
        return Crop(*resized, top, left, rows, columns)


class EvalTransform:
    """Resize to the short side of the configuration; nothing random."""

    augment = AugmentConfig("none")

    def __init__(self, config: ModelConfig, reduced_decoding: bool = False) -> None:
        """
        Args:
            config: the model's configuration, which gives the sizes.
            reduced_decoding: as `TrainTransform.reduced_decoding`; default: every pixel as in the official code.
        """
        self.short_side, self.max_size = config.image_size, config.max_image_size
        self.reduced_decoding = reduced_decoding

    def plan(
        self, height: int, width: int, generator: random.Random | None = None, boxes: np.ndarray | None = None
    ) -> Plan:
        """The resize of an image of this size; `generator` and `boxes` are not used."""
        return Plan(False, None, *resized_shape(height, width, self.short_side, self.max_size))

    def __call__(self, image: Tensor, target: dict, generator: random.Random | None = None) -> tuple[Tensor, dict]:
        """As `TrainTransform.__call__`."""
        return apply(image, target, self.plan(*image.shape[-2:]))

    def largest_shape(self) -> tuple[int, int]:
        """Short and long side, in pixels, that no result exceeds."""
        return self.short_side, self.max_size


def apply(image: Tensor, target: dict, plan: Plan) -> tuple[Tensor, dict]:
    """Apply a plan to an image and its boxes.

    Args:
        image: [3, H, W] uint8, with the size that the plan was made for, or decoded at a reduced one.
        target: `labels` [n] int64 and `boxes` [n, 4] float32, xyxy in pixels of the image; other entries are passed on.

    Returns:
        image [3, plan.height, plan.width] uint8; the target with `boxes` cxcywh in [0, 1]. Boxes that the plan drops,
        and those without area after the crop, are dropped with their labels.
    """
    return transform_images([image], plan), transform_targets([target], [tuple(image.shape[-2:])], plan)


def transform_images(images: Sequence[Tensor], plan: Plan | Mosaic) -> Tensor:
    """Apply a plan to pixels, on the device that they are on.

    Args:
        images: one, or the four of a mosaic; each as `apply` takes it.

    Returns:
        [3, plan.height, plan.width] uint8.
    """
    if isinstance(plan, Mosaic):
        return _assembled(images, plan)
    [image] = images
    image = _flip_and_crop(image, plan)
    # Before or after the resize, on fewer pixels: colours take the most time of all steps.
    is_first = image[0].numel() < plan.height * plan.width
    image = apply_colour(image, plan.colour) if plan.colour and is_first else image
    image = _resize(image, plan.height, plan.width)
    return apply_colour(image, plan.colour) if plan.colour and not is_first else image


def transform_targets(targets: Sequence[dict], sizes: Sequence[tuple[int, int]], plan: Plan | Mosaic) -> dict:
    """Apply a plan to boxes.

    Args:
        targets: of the image, or of the four images of a mosaic; each as `apply` takes it.
        sizes: (height, width) of each image in pixels.

    Returns:
        As `apply`. A mosaic has the `labels` and `boxes` of all images, but for boxes with a side below `LEAST_SIDE`,
        and the other entries of the first.
    """
    if not isinstance(plan, Mosaic):
        [target], [size] = targets, sizes
        return finish(
            {**target, "boxes": _moved(target["boxes"], size, plan)}, plan.height, plan.width, plan.least_side
        )
    boxes = []
    for number, (target, size) in enumerate(zip(targets, sizes, strict=True)):
        top, left = _corner(number, plan)
        inside = _moved(target["boxes"], size, plan.tiles[number])
        boxes.append(inside + inside.new_tensor([left, top, left, top]))
    labels = torch.cat([target["labels"] for target in targets])
    joined = {**targets[0], "labels": labels, "boxes": torch.cat(boxes)}
    return finish(joined, plan.height, plan.width, LEAST_SIDE)


def finish(target: dict, height: int, width: int, least_side: float = 0.0) -> dict:
    """Boxes from xyxy in pixels of a height × width image to cxcywh in [0, 1]; boxes without area, and those with a
    side below `least_side` pixels, are dropped."""
    boxes = target["boxes"]
    sides = boxes[:, 2:] - boxes[:, :2]
    keep = ((sides > 0) & (sides >= least_side)).all(dim=1)
    scale = boxes.new_tensor([width, height, width, height])
    boxes = box_convert(boxes[keep], "xyxy", "cxcywh") / scale
    return {**target, "boxes": boxes, "labels": target["labels"][keep]}


def augmentation_generator(seed: int, epoch: int, index: int) -> random.Random:
    """The generator of one image in one epoch: unique for (seed, epoch, index), and the same in every process."""
    # Seeds may have any length, so no hash is needed. Python promises equal `random()` for equal seeds in all versions.
    return random.Random((seed << 96) | (epoch << 64) | index)


def _flip_and_crop(image: Tensor, plan: Plan) -> Tensor:
    """The steps before the last resize."""
    if plan.flip:
        image = F.horizontal_flip(image)
    crop = plan.crop
    if crop is None:
        return image
    if crop.resizes:
        image = _resize(image, crop.height, crop.width)
    # A copy: torch would make the colours of a part of interleaved rows planar, and resize them in twice the time.
    part = F.crop(image, *_rectangle(crop, tuple(image.shape[-2:])))
    return part.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _moved(boxes: Tensor, size: tuple[int, int], plan: Plan) -> Tensor:
    """Boxes xyxy in pixels of an image of this size, in pixels of the plan's result. Dropped boxes have no area."""
    height, width = size
    if plan.flip:
        boxes = boxes.clone()
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    crop = plan.crop
    if crop is not None:
        if crop.resizes:
            boxes = _scaled(boxes, (height, width), (crop.height, crop.width))
            height, width = crop.height, crop.width
        if crop.by_centre:
            boxes = boxes * _is_centred(boxes, (height, width), crop)[:, None]
        top, left, height, width = _rectangle(crop, (height, width))
        boxes = clip_boxes_to_image(boxes - boxes.new_tensor([left, top, left, top]), (height, width))
    return _scaled(boxes, (height, width), (plan.height, plan.width))


def _scaled(boxes: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    return boxes * boxes.new_tensor([new_size[1] / size[1], new_size[0] / size[0]]).repeat(2)


def _assembled(images: Sequence[Tensor], mosaic: Mosaic) -> Tensor:
    canvas = images[0].new_empty(mosaic.height, mosaic.width, 3).permute(2, 0, 1)
    for number, (image, tile) in enumerate(zip(images, mosaic.tiles, strict=True)):
        top, left = _corner(number, mosaic)
        part = _resize(_flip_and_crop(image, tile), tile.height, tile.width)
        canvas[:, top : top + tile.height, left : left + tile.width] = part
    return canvas if mosaic.colour is None else apply_colour(canvas, mosaic.colour)


def _corner(number: int, mosaic: Mosaic) -> tuple[int, int]:
    """Top and left of a tile in its mosaic, in pixels."""
    tile = mosaic.tiles[number]
    return mosaic.height - tile.height if number >= 2 else 0, mosaic.width - tile.width if number % 2 else 0


def _rectangle(crop: Crop, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop, in whole pixels of an image of this size.

    They are rounded if the image was decoded at reduced size; boxes then move with the pixels that remain.
    """
    top, rows = _interval(crop.top, crop.rows, crop.height, size[0])
    left, columns = _interval(crop.left, crop.columns, crop.width, size[1])
    return top, left, rows, columns


def _is_centred(boxes: Tensor, size: tuple[int, int], crop: Crop) -> Tensor:
    """[n] bool: whether the centre of each box, in pixels of an image of this size, is in the rectangle."""
    x = (boxes[:, 0] + boxes[:, 2]) / 2 * (crop.width / size[1])
    y = (boxes[:, 1] + boxes[:, 3]) / 2 * (crop.height / size[0])
    in_columns = (crop.left <= x) & (x < crop.left + crop.columns)
    return in_columns & (crop.top <= y) & (y < crop.top + crop.rows)


def _interval(start: int, length: int, planned: int, side: int) -> tuple[int, int]:
    """Start and length of a part of a side, in whole pixels of an image with `side` instead of `planned` pixels."""
    first = min(round(start * side / planned), side - 1)
    return first, max(1, round((start + length) * side / planned) - first)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    return F.resize(image, [height, width], antialias=True)
