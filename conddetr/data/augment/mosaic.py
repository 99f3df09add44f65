"""Mosaics: one image put together from four.

Source: YOLOv4 (Bochkovskiy et al., 2020), section 3.4.
"""

from collections.abc import Sequence
from random import Random

from conddetr.data.augment.draws import coin, integer, uniform
from conddetr.data.augment.plans import Crop, Mosaic, Plan

CENTRE = (0.25, 0.75)
"""Range of the point where the four images meet, as shares of height and width."""


def plan_mosaic(
    indices: Sequence[int], sizes: Sequence[tuple[int, int]], size: tuple[int, int], flip: bool, generator: Random
) -> Mosaic:
    """Sample a mosaic.

    Each image is scaled until it covers its tile, and what hangs over is cut off at a random place: there is neither
    padding nor distortion.

    Args:
        indices: four images of a data set.
        sizes: their heights and widths, in pixels.
        size: (height, width) of the result, in pixels; at least 2 × 2.
        flip: mirror each image with probability 1/2.
        generator: the source of all choices.
    """
    height, width = size
    rows, columns = (min(side - 1, max(1, round(side * uniform(*CENTRE, generator)))) for side in size)
    shapes = [(h, w) for h in (rows, height - rows) for w in (columns, width - columns)]
    tiles = [_tile(*size, *shape, flip, generator) for size, shape in zip(sizes, shapes, strict=True)]
    return Mosaic(tuple(indices), tuple(tiles), height, width)


def _tile(height: int, width: int, rows: int, columns: int, flip: bool, generator: Random) -> Plan:
    """Plan of a height × width image that fills rows × columns."""
    scale = max(rows / height, columns / width)
    seen = min(height, max(1, round(rows / scale))), min(width, max(1, round(columns / scale)))
    top, left = (integer(0, side - part, generator) for side, part in zip((height, width), seen, strict=True))
    return Plan(flip and coin(generator), Crop(height, width, top, left, *seen, resizes=False), rows, columns)
