"""Meaning of a box's four numbers: x, y, width, height in pixels (correct), or fractions or two corners (wrong); and
whether they refer to the upright image, or to the image before its EXIF tag turns it.
"""

from dataclasses import dataclass

import numpy as np

TOLERANCE = 1.0
"""Pixels by which a box may exceed its image, because many tools round."""
_FRACTION_TOLERANCE = 1e-3
"""By how much fractions may exceed 0 and 1, because tools round their last digits."""


@dataclass(frozen=True)
class BoxReading:
    """Boxes that do not look like x, y, width, height in pixels."""

    kind: str
    """`fractions` or `corners`."""
    numbers: str
    """The likely meaning of their four numbers."""
    positions: np.ndarray
    """[n] int64, positions of these boxes."""
    pixels: np.ndarray
    """[n, 4] float64, the boxes converted to xywh in pixels."""
    is_whole: bool
    """Whether all plausible boxes are like that (for fractions: most of them); else two sources may be mixed."""


def box_readings(boxes: np.ndarray, sizes: np.ndarray) -> list[BoxReading]:
    """Likely readings of boxes other than x, y, width, height in pixels; empty if the boxes are correct.

    - Fractions of the image: all four numbers lie in [0, 1], so the box is under a pixel.
    - Two corners: boxes exceed their images as x, y, width, height, and at least half of those lie inside as corners.
      If no other box lies inside only as x, y, width, height, all boxes are corners.

    Args:
        boxes: [N, 4] as in the annotations.
        sizes: [N, 2] height and width of their images in pixels; 0, 0 if unknown.

    Returns:
        At most one of each kind.
    """
    is_known = (sizes > 1).all(1) & (boxes[:, 2:] > 0).all(1)
    is_fraction = is_known & (boxes >= -_FRACTION_TOLERANCE).all(1) & (boxes <= 1 + _FRACTION_TOLERANCE).all(1)
    readings = []
    if is_fraction.any():
        positions = np.flatnonzero(is_fraction)
        numbers, fractions = _likeliest(boxes[positions])
        pixels = fractions * np.tile(sizes[positions, ::-1], 2)
        readings.append(BoxReading("fractions", numbers, positions, pixels, 2 * len(positions) > is_known.sum()))
    others = is_known & ~is_fraction
    fits = (boxes[:, :2] >= -TOLERANCE).all(1) & (boxes[:, 2:] <= sizes[:, ::-1] + TOLERANCE).all(1)
    fits &= others & (boxes[:, 2:] > boxes[:, :2]).all(1)
    is_out = others & reaches_out(boxes, sizes)
    wrong = fits & is_out
    is_whole = bool((fits | is_out)[others].all()) and not (readings and readings[0].is_whole)
    if wrong.any() and 2 * wrong.sum() >= is_out.sum():
        positions = np.flatnonzero(fits if is_whole else wrong)
        corners = boxes[positions]
        pixels = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        readings.append(BoxReading("corners", "x, y of two corners", positions, pixels, is_whole))
    return readings


def reaches_out(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether boxes [N, 4] (xywh) exceed images of `sizes` [N, 2] (height, width) by more than `TOLERANCE` pixels."""
    ends = boxes[:, :2] + boxes[:, 2:]
    return (boxes[:, :2] < -TOLERANCE).any(1) | (ends > sizes[:, ::-1] + TOLERANCE).any(1)


def _likeliest(boxes: np.ndarray) -> tuple[str, np.ndarray]:
    """The reading by which most fractions [n, 4] lie in their image, and the fractions as xywh."""
    starts, ends = boxes[:, :2], boxes[:, 2:]
    candidates = {
        "x, y, width, height": boxes,
        "x, y of the centre, width, height": np.concatenate([starts - ends / 2, ends], axis=1),
        "x, y of two corners": np.concatenate([starts, ends - starts], axis=1),
    }

    def count_inside(fractions: np.ndarray) -> int:
        low, size = fractions[:, :2], fractions[:, 2:]
        inside = (low >= -_FRACTION_TOLERANCE) & (size > 0) & (low + size <= 1 + _FRACTION_TOLERANCE)
        return int(inside.all(1).sum())

    # The first one of equals.
    numbers = max(candidates, key=lambda name: count_inside(candidates[name]))
    return numbers, candidates[numbers]


def stored_fault(
    boxes: np.ndarray, annotated: tuple[int, int], upright: tuple[int, int], stored: tuple[int, int]
) -> str | None:
    """Why annotations whose size differs from the upright image's cannot be used; None if they clearly refer to the
    image as stored.

    Args:
        boxes: [n, 4] xywh in pixels.
        annotated, upright, stored: (height, width) in the annotations, of the image turned by its EXIF tag, and of the
            image as stored.
    """
    if annotated != stored:
        return "Boxes would be misplaced: correct the annotations, or replace the file with the right one."
    fits = {name: _fit(boxes, size) for name, size in (("stored", stored), ("upright", upright))}
    if len(boxes) and (fits["upright"] or not fits["stored"]):
        inside = "both ways" if all(fits.values()) else "only upright" if fits["upright"] else "neither way"
        return (
            f"That is the size as stored, before the EXIF tag turns the image, and the boxes fit {inside}. Write the "
            "upright size, or save the image without the tag."
        )
    return None


def _fit(boxes: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether no box exceeds the image by more than the tolerance."""
    return not reaches_out(boxes, np.array([size])).any()
