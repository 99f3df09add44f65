"""Crops that keep boxes, and large-scale jitter."""

import math
from dataclasses import replace
from random import Random

import numpy as np

from conddetr.data.augment.draws import choice, integer, uniform
from conddetr.data.augment.plans import Crop

OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None)
"""Least IoU of the crop with one of the boxes; None: no crop."""
SIDES = (0.3, 1.0)
"""Height and width of the crop as shares of the image's."""
ASPECT = 2.0
"""Largest ratio of the crop's sides."""
TRIALS = 40
JITTER = (0.1, 2.0)
"""Scale of large-scale jitter, relative to the size of evaluation."""
LEAST_LONG_SIDE = 32
"""Long side in pixels, below which jitter does not go; two cells of the feature map of stride 16."""


def plan_crop(height: int, width: int, boxes: np.ndarray, generator: Random) -> Crop | None:
    """Sample a crop with the centre of at least one box in it, or no crop.

    Source: SSD (Liu et al., ECCV 2016) and torchvision's `RandomIoUCrop`. A least IoU of the crop with a box is
    sampled, and the first of 40 random crops that has it is taken. If none has, another IoU is sampled, for the same
    crops.

    Args:
        height, width: of the image, in pixels.
        boxes: [n, 4] xyxy in pixels of the image. Without boxes there is no crop.
        generator: the source of all choices.
    """
    crops = _candidates(height, width, generator)
    overlaps = _overlaps(crops, boxes)
    options = list(OVERLAPS)
    while (least := choice(options, generator)) is not None:
        fitting = np.flatnonzero(overlaps >= least)
        if len(fitting):
            left, top, right, bottom = crops[fitting[0]].tolist()
            return Crop(height, width, top, left, bottom - top, right - left, resizes=False, by_centre=True)
        options.remove(least)
    return None


def _candidates(height: int, width: int, generator: Random) -> np.ndarray:
    """[m, 4] integer xyxy: those of `TRIALS` random rectangles that are neither empty nor too narrow."""
    draws = np.array([generator.random() for _ in range(4 * TRIALS)]).reshape(TRIALS, 4)
    low, high = SIDES
    size = np.array([width, height])
    sides = (size * (low + (high - low) * draws[:, :2])).astype(np.int64)
    corners = ((size - sides) * draws[:, 2:]).astype(np.int64)
    usable = (sides.min(1) > 0) & (sides.max(1) <= ASPECT * sides.min(1))
    return np.concatenate([corners, corners + sides], axis=1)[usable]


def _overlaps(crops: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """[m] largest IoU of each crop with a box whose centre is in it; -1: it has no centre."""
    if not len(boxes):
        return np.full(len(crops), -1.0)
    crops, centres = crops[:, None], (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((crops[..., :2] <= centres) & (centres < crops[..., 2:])).all(-1)
    sides = np.minimum(crops[..., 2:], boxes[:, 2:]) - np.maximum(crops[..., :2], boxes[:, :2])
    shared = sides.clip(0).prod(-1)
    areas = [(part[..., 2:] - part[..., :2]).prod(-1) for part in (crops, boxes)]
    return np.where(inside, shared / (areas[0] + areas[1] - shared), -1.0).max(1)


def plan_jitter(source: Crop, size: tuple[int, int], boxes: np.ndarray, generator: Random) -> tuple[Crop, int, int]:
    """Sample a large-scale jitter of a part of an image.

    Source: "Simple Copy-Paste" (Ghiasi et al., CVPR 2021), section 3, and torchvision's `ScaleJitter`. A smaller image
    is not padded to `size` here: batches pad, and the model masks the padding.

    Args:
        source: the part; the whole image, or a crop of it.
        size: (height, width) of the result at scale 1, in pixels. A larger result is cut to this size.
        boxes: [n, 4] xyxy in the frame of `source`. If `source.by_centre`, the cut contains the centre of one of them
            that `source` contains.
        generator: the source of all choices.

    Returns:
        The part of the image that remains, and the height and width to which it is resized.
    """
    # At least this long: from less, a stride-16 feature map would have a single cell, which batch norm cannot train on.
    scale = max(uniform(*JITTER, generator), min(1.0, LEAST_LONG_SIDE / max(size)))
    if scale <= 1:
        return source, max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    x, y = _kept_centre(source, boxes, generator) if source.by_centre else (None, None)
    rows, columns = (max(1, round(side / scale)) for side in (source.rows, source.columns))
    top = _position(source.top, source.rows, rows, y, generator)
    left = _position(source.left, source.columns, columns, x, generator)
    return replace(source, top=top, left=left, rows=rows, columns=columns), *size


def _kept_centre(source: Crop, boxes: np.ndarray, generator: Random) -> tuple[float, float] | tuple[None, None]:
    """(x, y) of a random box's centre in `source`; None, None: there is none."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    low = np.array([source.left, source.top])
    high = low + np.array([source.columns, source.rows])
    inside = ((low <= centres) & (centres < high)).all(1)
    return tuple(choice(centres[inside].tolist(), generator)) if inside.any() else (None, None)


def _position(start: int, side: int, part: int, centre: float | None, generator: Random) -> int:
    """Start of a part of [start, start + side), random among those with `centre` in the part."""
    low, high = start, start + side - part
    if centre is not None:
        low, high = max(low, math.floor(centre) - part + 1), min(high, math.floor(centre))
    return integer(low, high, generator)
