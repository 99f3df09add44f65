"""Folders of images with one annotation file per image."""

import glob
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from conddetr.data.annotations import Annotations, Names
from conddetr.data.images import image_sizes

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FILES_AT_A_TIME = 16
"""Concurrent header reads, which wait for the disk or the network; more gain nothing on a local disk."""


def is_image(name: str) -> bool:
    """Whether a file's name is an image's; hidden files do not count."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def images_below(folder: Path) -> list[Path]:
    """All image files of a folder and its subfolders, sorted by name; without hidden ones."""
    return [folder / name for name in sorted(glob.glob("**", root_dir=folder, recursive=True)) if is_image(name)]


def upright_sizes(paths: Sequence[Path]) -> np.ndarray:
    """[I, 2] int32, height and width of the upright images in pixels; errors as in `image_sizes`."""
    with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
        sizes = [size.upright for size in pool.map(image_sizes, paths)]
    return np.array(sizes, np.int32).reshape(-1, 2)


def packed(
    source: str,
    categories: dict[int, str],
    names: Sequence[str],
    sizes: np.ndarray,
    image_of: list[int],
    category_ids: list[int],
    boxes: np.ndarray,
    is_annotated: bool = True,
) -> Annotations:
    """Annotations whose ids of images and boxes start at 1.

    Args:
        source: the origin, for messages.
        categories: names by id.
        names: names of the I images, relative to their folder.
        sizes: [I, 2] int32, height and width.
        image_of, category_ids: position of the image, ascending, and category id of each of N boxes.
        boxes: [N, 4] float64 xywh in pixels.
        is_annotated: as `Annotations.is_annotated`.
    """
    position_of = {category_id: position for position, category_id in enumerate(categories)}
    return Annotations(
        source,
        [{"id": category_id, "name": name} for category_id, name in categories.items()],
        np.arange(1, len(names) + 1),
        Names(names),
        sizes,
        np.arange(1, len(image_of) + 1),
        np.array(image_of, np.int32),
        np.array([position_of[category_id] for category_id in category_ids], np.int32),
        boxes,
        boxes[:, 2] * boxes[:, 3],
        np.zeros(len(image_of), bool),
        is_annotated,
    )


def relative_names(paths: Sequence[Path], folder: Path) -> list[str]:
    """Names of files relative to a folder, with slashes."""
    return [Path(os.path.relpath(path, folder)).as_posix() for path in paths]
