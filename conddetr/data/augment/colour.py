"""Changes of brightness, contrast, saturation and hue.

Source: SSD (Liu et al., ECCV 2016), with the ranges and the order of torchvision's `RandomPhotometricDistort`, without
its permutation of the channels, which no camera makes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from conddetr.data.augment.draws import coin, uniform

Picture = TypeVar("Picture", Image.Image, Tensor)
Step = tuple[Callable[[Any, float], Any], float, float]
"""A function of torchvision, its factor, and the factor that changes nothing."""

BRIGHTNESS = (0.875, 1.125)
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE = (-0.05, 0.05)
"""Ranges of the factors, and of the hue's shift in turns of the colour circle."""


@dataclass(frozen=True)
class Colour:
    """Factors of brightness, contrast and saturation, and the shift of the hue in turns; defaults change nothing."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    contrast_first: bool = False
    """Whether contrast changes before saturation and hue, or after them."""


def plan_colour(generator: Random) -> Colour:
    """Sample a change; each part has probability 1/2."""
    brightness, contrast, saturation = (
        uniform(*limits, generator) if coin(generator) else 1.0 for limits in (BRIGHTNESS, CONTRAST, SATURATION)
    )
    hue = uniform(*HUE, generator) if coin(generator) else 0.0
    return Colour(brightness, contrast, saturation, hue, coin(generator))


def apply_colour(image: Tensor, colour: Colour) -> Tensor:
    """Change the colours of an image, [3, H, W] uint8, on its device; rounding differs between CPU and GPU."""
    if image.is_cuda:
        return _adjusted(image, colour)
    # As a PIL image: in half of the time that torchvision takes for tensors, and the colours stay interleaved.
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return torch.from_numpy(np.array(_adjusted(picture, colour))).permute(2, 0, 1)


def _adjusted(picture: Picture, colour: Colour) -> Picture:
    contrast: Step = (F.adjust_contrast, colour.contrast, 1.0)
    steps: list[Step] = [(F.adjust_saturation, colour.saturation, 1.0), (F.adjust_hue, colour.hue, 0.0)]
    steps.insert(0 if colour.contrast_first else len(steps), contrast)
    steps.insert(0, (F.adjust_brightness, colour.brightness, 1.0))
    for adjust, value, neutral in steps:
        picture = picture if value == neutral else adjust(picture, value)
    return picture
