"""Augmentation of training images, with their boxes.

The augmentation of an image is planned first, from its size and a generator alone, and applied later. So the shapes of
a whole epoch are known before an image is read, and a plan does not depend on the process that reads the image.

Source: DETR section A.4; `make_coco_transforms` of `datasets/coco.py` in the official code.
"""

import random
from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms.v2 import functional as F

from conddetr.config import ModelConfig
from conddetr.data.images import resized_shape

_REFERENCE_SIZE = 800
_SCALES = tuple(range(480, 801, 32))
_CROP_SCALES = (400, 500, 600)
_CROP_RANGE = (384, 600)


@dataclass(frozen=True)
class Crop:
    """A resize to (`height`, `width`), then the rectangle [top, top + rows) × [left, left + columns) of it; pixels."""

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Plan:
    """The steps of one image's augmentation, in this order."""

    flip: bool
    """Mirror left and right."""
    crop: Crop | None
    height: int
    """Height of the result, in pixels."""
    width: int

    def first_size(self) -> tuple[int, int]:
        """Height and width of the first resize, in pixels."""
        return (self.height, self.width) if self.crop is None else (self.crop.height, self.crop.width)


class TrainTransform:
    """Random flip, then either a multi-scale resize, or a resize, a random crop and that resize.

    All sizes are the official ones times `config.image_size` / 800.
    """

    reduced_decoding = True
    """JPEGs much larger than their target are decoded at 1/2, 1/4, 1/8; pixels differ slightly, see `read_reduced`."""

    def __init__(self, config: ModelConfig) -> None:
        factor = config.image_size / _REFERENCE_SIZE
        self.scales = [round(size * factor) for size in _SCALES]
        self.crop_scales = [round(size * factor) for size in _CROP_SCALES]
        self.crop_range = [round(size * factor) for size in _CROP_RANGE]
        self.max_size = config.max_image_size

    def plan(self, height: int, width: int, generator: random.Random) -> Plan:
        """Sample the augmentation of an image of this size."""
        flip = _coin(generator)
        crop = self._plan_crop(height, width, generator) if _coin(generator) else None
        size = (height, width) if crop is None else (crop.rows, crop.columns)
        return Plan(flip, crop, *resized_shape(*size, _choice(self.scales, generator), self.max_size))

    def __call__(self, image: Tensor, target: dict, generator: random.Random) -> tuple[Tensor, dict]:
        """Plan and apply; arguments and result as in `apply`."""
        return apply(image, target, self.plan(*image.shape[-2:], generator))

    def largest_shape(self) -> tuple[int, int]:
        """Short and long side, in pixels, that no result exceeds."""
        return max(self.scales), self.max_size

    def _plan_crop(self, height: int, width: int, generator: random.Random) -> Crop:
        short_side = _choice(self.crop_scales, generator)
        # The first resize has no official bound; this one keeps a 1×2000 strip from a side of a million pixels.
        resized = resized_shape(height, width, short_side, 8 * short_side)
        low, high = self.crop_range
        rows, columns = (_integer(min(low, side), min(side, high), generator) for side in resized)
        top = _integer(0, resized[0] - rows, generator)
        left = _integer(0, resized[1] - columns, generator)
        return Crop(*resized, top, left, rows, columns)


class EvalTransform:
    """Resize to the short side of the configuration; nothing random."""

    def __init__(self, config: ModelConfig, reduced_decoding: bool = False) -> None:
        """
        Args:
            config: the model's configuration, which gives the sizes.
            reduced_decoding: as `TrainTransform.reduced_decoding`; default: every pixel as in the official code.
        """
        self.short_side, self.max_size = config.image_size, config.max_image_size
        self.reduced_decoding = reduced_decoding

    def plan(self, height: int, width: int, generator: random.Random | None = None) -> Plan:
        """The resize of an image of this size; `generator` is not used."""
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
        image: [3, H, W] uint8, with the size that the plan was made for.
        target: `labels` [n] int64 and `boxes` [n, 4] float32, xyxy in pixels; other entries are passed on.

    Returns:
        image [3, plan.height, plan.width] uint8; the target with `boxes` cxcywh in [0, 1]. Boxes without area after
        the crop are dropped, with their labels.
    """
    boxes = target["boxes"]
    if plan.flip:
        image, boxes = _flip(image, boxes)
    if plan.crop is not None:
        image, boxes = _resize(image, boxes, plan.crop.height, plan.crop.width)
        image, boxes = _crop(image, boxes, plan.crop)
    image, boxes = _resize(image, boxes, plan.height, plan.width)
    return image, finish({**target, "boxes": boxes}, plan.height, plan.width)


def finish(target: dict, height: int, width: int) -> dict:
    """Boxes from xyxy in pixels of a height × width image to cxcywh in [0, 1]; boxes without area are dropped."""
    boxes = target["boxes"]
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    scale = boxes.new_tensor([width, height, width, height])
    boxes = box_convert(boxes[keep], "xyxy", "cxcywh") / scale
    return {**target, "boxes": boxes, "labels": target["labels"][keep]}


def augmentation_generator(seed: int, epoch: int, index: int) -> random.Random:
    """The generator of one image in one epoch: unique for (seed, epoch, index), and the same in every process."""
    # Seeds may have any length, so no hash is needed. Python promises equal `random()` for equal seeds in all versions.
    return random.Random((seed << 96) | (epoch << 64) | index)


def _flip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    boxes = boxes.clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    return F.horizontal_flip(image), boxes


def _crop(image: Tensor, boxes: Tensor, crop: Crop) -> tuple[Tensor, Tensor]:
    boxes = boxes - boxes.new_tensor([crop.left, crop.top, crop.left, crop.top])
    boxes = clip_boxes_to_image(boxes, (crop.rows, crop.columns))
    part = F.crop(image, crop.top, crop.left, crop.rows, crop.columns)
    # A copy: torch would make the colours of a part of interleaved rows planar, and resize them in twice the time.
    return part.permute(1, 2, 0).contiguous().permute(2, 0, 1), boxes


def _resize(image: Tensor, boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    ratio = boxes.new_tensor([width / image.shape[-1], height / image.shape[-2]]).repeat(2)
    return F.resize(image, [height, width], antialias=True), boxes * ratio


def _coin(generator: random.Random) -> bool:
    return generator.random() < 0.5


def _integer(low: int, high: int, generator: random.Random) -> int:
    """Uniform in [low, high], from `random()` alone, the only method that Python promises not to change."""
    return low + int(generator.random() * (high - low + 1))


def _choice(values: list[int], generator: random.Random) -> int:
    return values[_integer(0, len(values) - 1, generator)]
