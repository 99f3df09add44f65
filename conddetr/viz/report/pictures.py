"""Pictures of single errors: a part of the image as JPEG, with boxes to draw over it."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from conddetr.engine.quality import IOU, KINDS, Overlaps, Quality

MAX_PICTURES = 12
"""Pictures of wrong detections, and of missed objects."""
MAX_SIDE = 480
"""Longest side of a picture, in pixels."""
_JPEG_QUALITY = 80
_CONTEXT = 3.0
"""The part that is shown is this many times as wide as the box, and at least `_LEAST_PART` of the image."""
_LEAST_PART = 0.5
_ASPECT = 0.75
"""Height to width of the part, as far as the image and the box allow it."""
_MARGIN = 1.2
"""The part is at least this many times as high and wide as the box."""

ReadImage = Callable[[int], Tensor]
"""An image by its position in the ground truth, [3, H, W] uint8; raises OSError or ValueError if it cannot be read."""


@dataclass(frozen=True)
class DrawnBox:
    """A box over a picture."""

    box: tuple[float, float, float, float]
    """xywh in pixels of the original image; in a `Picture`, relative to the part that is shown."""
    style: str
    """Class name in the style sheet."""
    label: str
    """Drawn beside the box; empty: nothing."""


@dataclass(frozen=True)
class Picture:
    """One error. Without `uri` the image could not be read, for the reason in `fault`."""

    title: str
    note: str
    image: str
    """File name and id of the image."""
    width: int = 1
    """Size of the part that is shown, in pixels of the original image."""
    height: int = 1
    uri: str = ""
    """The part as JPEG, in a data URI."""
    boxes: tuple[DrawnBox, ...] = ()
    fault: str = ""


def wrong_detections(quality: Quality, images: list[dict], read: ReadImage) -> list[Picture]:
    """The most confident wrong detection of each image, at most `MAX_PICTURES`, most confident first.

    Args:
        images: the ground truth's images.
        read: the images' pixels.
    """
    overlaps, errors = quality.overlaps, quality.errors
    pictures = []
    for row in _first_of_each(overlaps.images[errors.wrong]):
        detection, nearest = int(errors.wrong[row]), int(errors.nearest[row])
        image = int(overlaps.images[detection])
        wrong = _detection_box(overlaps, detection)
        note = f"{KINDS[errors.kinds[row]]}: {_nearness(overlaps, detection, nearest)}"
        boxes = [*_object_boxes(overlaps, image, nearest), wrong]
        pictures.append(_picture(images[image], (wrong.label, note), overlaps.boxes[detection], boxes, read, image))
    return pictures


def missed_objects(quality: Quality, images: list[dict], read: ReadImage) -> list[Picture]:
    """The largest object without a right detection of each image, at most `MAX_PICTURES`, largest first; arguments as
    in `wrong_detections`.
    """
    overlaps, undetected = quality.overlaps, quality.errors.undetected
    areas = overlaps.object_boxes[undetected, 2:].prod(1)
    undetected = undetected[np.argsort(-areas, kind="stable")]
    pictures = []
    for row in _first_of_each(overlaps.object_images[undetected]):
        target = int(undetected[row])
        image, box = int(overlaps.object_images[target]), overlaps.object_boxes[target]
        boxes, note = _object_boxes(overlaps, image, target), "no detection has an IoU of 0.5 with it"
        on_it = overlaps.pair_detections[(overlaps.pair_objects == target) & (overlaps.ious >= IOU)].tolist()
        if on_it:
            best = _detection_box(overlaps, on_it[0])
            is_below = overlaps.scores[on_it[0]] < np.float32(quality.threshold)
            note = f"most confident detection on it: {best.label}{', below the threshold' if is_below else ''}"
            boxes.append(best)
        title = f"{overlaps.names[overlaps.object_classes[target]]}, {box[2]:.0f} × {box[3]:.0f} pixels"
        pictures.append(_picture(images[image], (title, note), box, boxes, read, image))
    return pictures


def _first_of_each(images: np.ndarray) -> list[int]:
    """Positions of the first entry of every image, in order, at most `MAX_PICTURES`."""
    _, first = np.unique(images, return_index=True)
    return np.sort(first)[:MAX_PICTURES].tolist()


def _nearness(overlaps: Overlaps, detection: int, nearest: int) -> str:
    """The IoU of a wrong detection with the object that explains it."""
    if nearest < 0:
        return "IoU below 0.1 with every object"
    pair = (overlaps.pair_detections == detection) & (overlaps.pair_objects == nearest)
    return f"IoU {overlaps.ious[pair][0]:.2f} with {overlaps.names[overlaps.object_classes[nearest]]}"


def _detection_box(overlaps: Overlaps, detection: int) -> DrawnBox:
    label = f"{overlaps.names[overlaps.classes[detection]]} {overlaps.scores[detection]:.2f}"
    return DrawnBox(tuple(overlaps.boxes[detection].tolist()), "wrong", label)


def _object_boxes(overlaps: Overlaps, image: int, named: int) -> list[DrawnBox]:
    """The objects of an image, `named` last and with its class name; crowds are left out."""
    objects = np.flatnonzero((overlaps.object_images == image) & ~overlaps.crowds).tolist()
    boxes = [DrawnBox(tuple(overlaps.object_boxes[other].tolist()), "other", "") for other in objects if other != named]
    if named >= 0:
        name = overlaps.names[overlaps.object_classes[named]]
        boxes.append(DrawnBox(tuple(overlaps.object_boxes[named].tolist()), "truth", name))
    return boxes


def _picture(
    entry: dict, texts: tuple[str, str], centre: np.ndarray, boxes: list[DrawnBox], read: ReadImage, image: int
) -> Picture:
    """The part of an image around the box `centre`, xywh in pixels; `texts` are title and note."""
    name = f"{entry['file_name']} · id {entry['id']}" if entry.get("file_name") else f"id {entry['id']}"
    try:
        pixels = read(image)
    except (OSError, ValueError) as error:
        return Picture(*texts, name, fault=str(error))
    top, left, rows, columns = shown_part(centre, *pixels.shape[-2:])
    part = pixels[:, top : top + rows, left : left + columns]
    inside = tuple(
        DrawnBox((drawn.box[0] - left, drawn.box[1] - top, *drawn.box[2:]), drawn.style, drawn.label)
        for drawn in boxes
        if _meets(drawn.box, left, top, columns, rows)
    )
    return Picture(*texts, name, columns, rows, _jpeg(part), inside)


def shown_part(box: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, rows and columns of the part of an image that shows a box with its surroundings.

    Args:
        box: xywh in pixels.
        height, width: the image's size.
    """
    x, y, box_width, box_height = box.tolist()
    side = max(_CONTEXT * box_width, _CONTEXT * box_height, _LEAST_PART * max(height, width))
    # Where the image ends, the other side is shortened too, but never cuts the box.
    rows = max(min(_ASPECT * side, _ASPECT * width, height), min(_MARGIN * box_height, height))
    columns = max(min(side, rows / _ASPECT, width), min(_MARGIN * box_width, width))
    rows, columns = max(1, round(rows)), max(1, round(columns))
    top = min(max(round(y + (box_height - rows) / 2), 0), height - rows)
    left = min(max(round(x + (box_width - columns) / 2), 0), width - columns)
    return top, left, rows, columns


def _meets(box: tuple[float, float, float, float], left: int, top: int, columns: int, rows: int) -> bool:
    x, y, width, height = box
    return x < left + columns and y < top + rows and x + width > left and y + height > top


def _jpeg(pixels: Tensor) -> str:
    """[3, H, W] uint8 as a JPEG of at most `MAX_SIDE` pixels, in a data URI."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "jpeg", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
