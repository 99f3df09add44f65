"""Boxes drawn on pixels, for photos and frames of videos: several times faster than a figure, in the same colours."""

import functools
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from conddetr.viz.fonts import family_of, lettering

Colour = tuple[int, int, int]

LEAST_SIDE = 480
"""Longer side in pixels to which smaller photos are enlarged, so that captions hide less of them."""


def drawn_photo(image: Tensor, boxes: Tensor, labels: Sequence[int], captions: Sequence[str]) -> np.ndarray:
    """A copy of an image with boxes, [h, w, 3] uint8, of its size or enlarged to `LEAST_SIDE`.

    Args:
        image: [3, H, W], uint8 or float in [0, 1].
        boxes, labels, captions: as in `drawn_frame`.
    """
    image = image if image.dtype == torch.uint8 else (255 * image).round().to(torch.uint8)
    photo = _as_picture(image)
    scale = max(1.0, LEAST_SIDE / max(photo.size))
    if scale > 1:
        width, height = (max(1, round(scale * side)) for side in photo.size)
        photo = photo.resize((width, height), Image.Resampling.BICUBIC)
    return _with_boxes(photo, scale * boxes, labels, captions)


def drawn_frame(image: Tensor, boxes: Tensor, labels: Sequence[int], captions: Sequence[str]) -> np.ndarray:
    """A copy of a frame with boxes, [H, W, 3] uint8.

    Args:
        image: [3, H, W] uint8.
        boxes: [n, 4] xyxy in pixels.
        labels: one class index per box; it sets the colour.
        captions: one text per box, in any script for which a font is installed.
    """
    return _with_boxes(_as_picture(image), boxes, labels, captions)


def _as_picture(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def _with_boxes(picture: Image.Image, boxes: Tensor, labels: Sequence[int], captions: Sequence[str]) -> np.ndarray:
    """The pixels of a picture after boxes are drawn on it."""
    draw = ImageDraw.Draw(picture)
    # Legible in pictures of any size.
    line = max(2, round(min(picture.size) / 300))
    # Pillow cannot measure text of several lines.
    texts, _ = lettering([" ".join(caption.splitlines()) for caption in captions])
    for box, label, text in zip(boxes.tolist(), labels, texts, strict=True):
        red, green, blue, _ = (round(255 * part) for part in colormaps["tab10"](int(label) % 10))
        x0, y0, x1, y1 = box
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=(red, green, blue), width=line)
        _draw_caption(draw, (max(x0, 0), y0), text, 7 * line, (red, green, blue))
    return np.asarray(picture)


def _draw_caption(draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, size: int, colour: Colour) -> None:
    """White text on a coloured ground above a corner, or below it if there is no room above.

    The edge ends the number of a caption that partly covers another.
    """
    runs = [("".join(letters), _font(family, size)) for family, letters in groupby(text, family_of)]
    width, height = sum(font.getlength(run) for run, font in runs), round(1.3 * size)
    x, y = corner
    y = y - height if y >= height else max(y, 0)
    draw.rectangle((x, y, x + width + 4, y + height - 1), fill=colour, outline="white")
    for run, font in runs:
        draw.text((x + 2, y + height / 2), run, fill="white", font=font, anchor="lm")
        x += font.getlength(run)


@functools.lru_cache(maxsize=64)
def _font(family: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(FontProperties(family=[family])), size)
