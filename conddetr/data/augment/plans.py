"""The plan of an augmentation: all of its random choices."""

import math
from dataclasses import dataclass

from conddetr.data.augment.colour import Colour


@dataclass(frozen=True)
class Crop:
    """The rectangle [top, top + rows) × [left, left + columns) of an image of `height` × `width`; pixels."""

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int
    resizes: bool = True
    """Whether the image is resized to `height` × `width` before. Else it has this size, or is decoded at a reduced one,
    and the rectangle is reduced with it."""
    by_centre: bool = False
    """Drop boxes whose centre is not in the rectangle."""


@dataclass(frozen=True)
class Plan:
    """The steps of one image's augmentation, in this order."""

    flip: bool
    """Mirror left and right."""
    crop: Crop | None
    height: int
    """Height of the result, in pixels."""
    width: int
    colour: Colour | None = None
    least_side: float = 0.0
    """Boxes that are narrower or lower in the result, in pixels, are dropped; those without area always are."""

    def first_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the image needs before the first step for the detail of the result."""
        if self.crop is None:
            return self.height, self.width
        if self.crop.resizes:
            return self.crop.height, self.crop.width
        crop = self.crop
        return math.ceil(crop.height * self.height / crop.rows), math.ceil(crop.width * self.width / crop.columns)


@dataclass(frozen=True)
class Mosaic:
    """One image put together from four: upper left, upper right, lower left, lower right."""

    indices: tuple[int, ...]
    """The images' indices in their data set; the first is the one that is replaced."""
    tiles: tuple[Plan, ...]
    """Their plans, in the order of the indices; the results cover the whole without a gap."""
    height: int
    """Height of the whole, in pixels."""
    width: int
    colour: Colour | None = None
    """Change of colours of the whole."""
