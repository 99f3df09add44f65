"""Augmentation of training images, with their boxes.

Source: DETR section A.4; `make_coco_transforms` of `datasets/coco.py` in the official code.
"""

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms.v2 import functional as F

from conddetr.config import ModelConfig
from conddetr.data.images import resized_shape, to_model_input

_REFERENCE_SIZE = 800
_SCALES = tuple(range(480, 801, 32))
_CROP_SCALES = (400, 500, 600)
_CROP_RANGE = (384, 600)


class TrainTransform:
    """Random flip, then either a multi-scale resize, or a resize, a random crop and that resize.

    All sizes are the official ones times `config.image_size` / 800. Randomness comes from torch's global
    generator, which a data loader seeds per worker.
    """

    def __init__(self, config: ModelConfig) -> None:
        factor = config.image_size / _REFERENCE_SIZE
        self.scales = [round(size * factor) for size in _SCALES]
        self.crop_scales = [round(size * factor) for size in _CROP_SCALES]
        self.crop_range = [round(size * factor) for size in _CROP_RANGE]
        self.max_size = config.max_image_size

    def __call__(self, image: Tensor, target: dict) -> tuple[Tensor, dict]:
        """image [3, H, W], target with `boxes` [n, 4] xyxy pixels and `labels` [n] -> as `finish`."""
        boxes = target["boxes"]
        if _coin():
            image, boxes = _flip(image, boxes)
        if _coin():
            image, boxes = _resize(image, boxes, _choice(self.crop_scales), None)
            image, boxes = self._crop(image, boxes)
        image, boxes = _resize(image, boxes, _choice(self.scales), self.max_size)
        return finish(image, {**target, "boxes": boxes})

    def _crop(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.crop_range
        height, width = (_integer(min(low, side), min(side, high)) for side in image.shape[-2:])
        top = _integer(0, image.shape[-2] - height)
        left = _integer(0, image.shape[-1] - width)
        boxes = boxes - boxes.new_tensor([left, top, left, top])
        return F.crop(image, top, left, height, width), clip_boxes_to_image(boxes, (height, width))


class EvalTransform:
    """Resize to the short side of the configuration; nothing random."""

    def __init__(self, config: ModelConfig) -> None:
        self.short_side, self.max_size = config.image_size, config.max_image_size

    def __call__(self, image: Tensor, target: dict) -> tuple[Tensor, dict]:
        """As `TrainTransform.__call__`."""
        image, boxes = _resize(image, target["boxes"], self.short_side, self.max_size)
        return finish(image, {**target, "boxes": boxes})


def finish(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """Normalise: image to float32 with ImageNet's statistics, boxes from xyxy pixels to cxcywh in [0, 1].

    Boxes that a crop left without area go, with their labels.
    """
    height, width = image.shape[-2:]
    boxes = target["boxes"]
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    scale = boxes.new_tensor([width, height, width, height])
    boxes = box_convert(boxes[keep], "xyxy", "cxcywh") / scale
    return to_model_input(image), {**target, "boxes": boxes, "labels": target["labels"][keep]}


def _flip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    canvas = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])
    return F.horizontal_flip(image), F.horizontal_flip(canvas).as_subclass(Tensor)


def _resize(image: Tensor, boxes: Tensor, short_side: int, max_side: int | None) -> tuple[Tensor, Tensor]:
    height, width = image.shape[-2:]
    # Without a bound the long side is still kept finite: a 1×2000 strip would ask for a million pixels.
    bound = max_side if max_side is not None else 8 * short_side
    new_height, new_width = resized_shape(height, width, short_side, bound)
    ratio = boxes.new_tensor([new_width / width, new_height / height]).repeat(2)
    return F.resize(image, [new_height, new_width], antialias=True), boxes * ratio


def _coin() -> bool:
    return bool(torch.rand(()) < 0.5)


def _integer(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def _choice(values: list[int]) -> int:
    return values[_integer(0, len(values) - 1)]
