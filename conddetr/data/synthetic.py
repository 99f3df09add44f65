"""An endless, seeded set of textured shapes on clutter: a detection task without a download."""

from functools import lru_cache
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from conddetr.config.augment import AugmentConfig
from conddetr.data.augment.plans import Plan
from conddetr.data.images import to_model_input

CLASSES = ("disk", "square", "triangle")
MAX_SHAPES = 4
MAX_OVERLAP = 0.1
_LEAST_BAR, _LARGEST_BAR = np.array([0, 0.3, 0.01]), np.array([0.9, 0.9, 0.04])
"""Start, length and width, as fractions of the image's side."""


class SyntheticShapes(Dataset):
    """Square images with one to four shapes of three classes, textured, on noise and bars.

    Image `i` of seed `s` is always the same; any index ≥ 0 is valid, so a training run never sees one twice.
    Targets have the form of `CocoDetection`'s; category ids are 1, 2, 3.
    """

    endless = True
    is_annotated = True
    augment = AugmentConfig("none")

    def __init__(self, length: int, seed: int, image_size: int = 128) -> None:
        """
        Args:
            length: images per epoch.
            seed: the seed of the set; sets with different seeds have no image in common.
            image_size: height and width in pixels.
        """
        self.length, self.seed, self.image_size = length, seed, image_size
        self.classes = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]

    @property
    def source(self) -> str:
        """The origin of the images, for tables."""
        return f"synthetic shapes of seed {self.seed}"

    def describe(self) -> str:
        """Source, number of images and number of classes, in one line."""
        return f"{self.source}: {self.length} images, {len(CLASSES)} classes"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        """The normalised image and its target; see `load`."""
        image, target = self.load(index, self.plan(index))
        return to_model_input(image), target

    def plan(self, index: int, generator: Random | None = None) -> Plan:
        """A plan that changes nothing, because every image is new."""
        return Plan(False, None, self.image_size, self.image_size)

    def whole_plan(self, index: int) -> Plan:
        """As `plan`."""
        return self.plan(index)

    def largest_shape(self) -> tuple[int, int]:
        """Short and long side of every image, in pixels."""
        return self.image_size, self.image_size

    def load(self, index: int, plan: Plan) -> tuple[Tensor, dict]:
        """Draw an image.

        Returns:
            [3, S, S] uint8, and the target: `labels` [n] int64, `boxes` [n, 4] cxcywh in [0, 1], `image_id`,
            `original_size` (height, width).
        """
        pixels, labels, boxes = self.draw(index)
        target = {
            "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": torch.tensor([_relative(box, self.image_size) for box in boxes], dtype=torch.float32),
            "image_id": index,
            "original_size": (self.image_size, self.image_size),
        }
        return torch.from_numpy(pixels).permute(2, 0, 1), target

    def draw(self, index: int) -> tuple[np.ndarray, list[int], list[list[float]]]:
        """Pixels [S, S, 3] uint8, labels, and xyxy boxes in pixels."""
        rng = np.random.default_rng((self.seed, index))
        canvas = _background(rng, self.image_size)
        labels, boxes = [], []
        for _ in range(int(rng.integers(1, MAX_SHAPES + 1))):
            label = int(rng.integers(len(CLASSES)))
            side = int(rng.uniform(0.18, 0.42) * self.image_size)
            left, top = rng.integers(0, self.image_size - side, size=2).tolist()
            mask, (x0, y0, x1, y1) = _shape(label, side)
            box = [left + x0, top + y0, left + x1, top + y1]
            if any(_overlap(box, other) > MAX_OVERLAP for other in boxes):
                continue
            np.copyto(canvas[top : top + side, left : left + side], _texture(rng, side), where=mask)
            labels.append(label)
            boxes.append(box)
        canvas *= 255
        return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8), labels, boxes

    def ground_truth(self) -> dict:
        """The first `length` images' annotations in COCO's format, for evaluation."""
        images, annotations = [], []
        for index in range(self.length):
            _, labels, boxes = self.draw(index)
            images.append({"id": index, "height": self.image_size, "width": self.image_size})
            for label, (x0, y0, x1, y1) in zip(labels, boxes, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": label + 1,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": 0,
                    }
                )
        return {"images": images, "annotations": annotations, "categories": self.classes}


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Soft blotches, bars that are not objects, and pixel noise; [S, S, 3] float32, roughly in [0, 1]."""
    coarse = torch.from_numpy(rng.uniform(0.3, 0.7, size=(1, 3, 5, 5)).astype(np.float32))
    # Interleaved colours, as in the canvas.
    coarse = coarse.contiguous(memory_format=torch.channels_last)
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    canvas = smooth[0].permute(1, 2, 0).numpy()
    for _ in range(int(rng.integers(2, 6))):
        lengths = (_LEAST_BAR + (_LARGEST_BAR - _LEAST_BAR) * rng.random(3)) * size
        start, length, width = lengths.astype(int).tolist()
        across = int(rng.integers(size))
        bar = (slice(start, start + length), slice(across, across + max(1, width)))
        canvas[bar if rng.random() < 0.5 else bar[::-1]] = rng.random(3)
    noise = rng.random(canvas.shape, dtype=np.float32)
    noise -= 0.5
    noise *= 0.15
    canvas += noise
    return canvas


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Two colours in stripes, checks or noise; [side, side, 3] float32 in [0, 1]."""
    position = np.arange(side)
    period = int(rng.integers(3, 8))
    angle = rng.uniform(0, np.pi)
    pattern = int(rng.integers(3))
    if pattern == 2:
        share = rng.random((side, side)).astype(np.float32)[..., None]
        first, second = rng.random((2, 3))
        return (share * first + (1 - share) * second).astype(np.float32)
    if pattern == 0:
        number = np.floor((position * np.cos(angle) + position[:, None] * np.sin(angle)) / period).astype(int)
    else:
        number = position // period + position[:, None] // period
    colours = rng.random((2, 3)).astype(np.float32)
    return colours.take(1 - number % 2, axis=0)


@lru_cache(maxsize=256)
def _shape(label: int, side: int) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Mask of the pixels whose centre lies in a shape that fills a square, [side, side, 3] bool; its tight xyxy box."""
    v, u = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    if CLASSES[label] == "disk":
        mask = u**2 + v**2 <= 0.25
    elif CLASSES[label] == "square":
        mask = np.ones_like(u, dtype=bool)
    else:
        mask = np.abs(u) <= (v + 0.5) / 2
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    # Repeated for each colour: broadcasting the mask at each use takes three times as long.
    return np.repeat(mask[..., None], 3, axis=2), tuple(map(float, box))


def _relative(box: list[float], size: int) -> list[float]:
    """An xyxy box in pixels of a size × size image as cxcywh in [0, 1]."""
    x0, y0, x1, y1 = box
    return [(x0 + x1) / 2 / size, (y0 + y1) / 2 / size, (x1 - x0) / size, (y1 - y0) / size]


def _overlap(a: list[float], b: list[float]) -> float:
    """Intersection over the smaller area of two xyxy boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
