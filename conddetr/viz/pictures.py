"""The images that a command draws, and paths for their pictures that overwrite nothing else."""

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from conddetr.engine.progress import say
from conddetr.viz.boxes import save_figure

NOT_DECODED = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow registers but cannot read."""


def image_file(name: str | Path) -> Path:
    """The path of an image file.

    Raises:
        FileNotFoundError: the file does not exist.
        IsADirectoryError: the path is a folder.
    """
    path = Path(name)
    if path.is_dir():
        raise IsADirectoryError(f"Image file {path}: expected a file, got a folder.")
    if not path.is_file():
        raise FileNotFoundError(f"Image file {path} does not exist.")
    return path


def find_images(names: Sequence[str | Path]) -> list[Path]:
    """Image files, in the order of the names.

    Args:
        names: files with any suffix, or folders. A folder's images are sorted by name; subfolders and pictures that
            `predict` drew are skipped.

    Raises:
        FileNotFoundError: a file does not exist, or a folder contains no image.
    """
    return [
        image for name in names for image in (_images_in(Path(name)) if Path(name).is_dir() else [image_file(name)])
    ]


def _images_in(folder: Path) -> list[Path]:
    Image.init()
    known = {end for end, name in Image.registered_extensions().items() if name in Image.OPEN.keys() - NOT_DECODED}
    # Files whose names begin with a dot hold metadata of other systems, not images.
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in known]
    drawn = {path for path in images if _has_marks(path, {"Software": _software("predict")})}
    if len(drawn) == len(images):
        content = f"{len(files)} files" + (f", {len(drawn)} of them drawn by predict" if drawn else "")
        raise FileNotFoundError(f"Folder {folder} contains no image: {content}. Subfolders are not searched.")
    if drawn:
        say(f"{folder}: of {len(images)} images, {len(drawn)} drawn by predict are skipped")
    return [path for path in images if path not in drawn]


class PictureFolder:
    """A folder for pictures of images; saving replaces only an earlier picture of the same image.

    The metadata of a picture names the command and, as a hash of its path, the image.
    """

    def __init__(self, folder: str | Path, command: str, images: Sequence[Path]) -> None:
        """
        Args:
            folder: created if absent.
            command: name of the command that draws.
            images: all images that will be read; none of them is replaced.

        Raises:
            NotADirectoryError: the folder is a file.
        """
        self.folder, self._command = Path(folder), command
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder}: expected a folder for pictures, got a file.")
        self._images = {_identity(image) for image in images}

    def save(self, figure: Figure, image: Path, ending: str = "") -> Path:
        """Write the picture of an image, as PNG; returns its path.

        Its name is the image's name without suffix, then the ending; then `-2`, `-3`, … if the name is taken.
        """
        source = hashlib.blake2b(os.fsencode(image.resolve()), digest_size=16).hexdigest()
        marks = {"Software": _software(self._command), "Source": source}
        name = f"{image.stem}{ending}"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        paths = (self.folder / f"{name}.png" for name in names)
        return save_figure(figure, next(path for path in paths if self._is_free(path, marks)), marks=marks)

    def _is_free(self, path: Path, marks: dict[str, str]) -> bool:
        if not os.path.lexists(path):
            return True
        is_own_file = path.is_file() and not path.is_symlink() and _identity(path) not in self._images
        return is_own_file and _has_marks(path, marks)


def _software(command: str) -> str:
    return f"conddetr {command}"


def _identity(path: Path) -> tuple[int, int]:
    """Identity of a file, equal for all of its names."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _has_marks(path: Path, marks: dict[str, str]) -> bool:
    """Whether a file is a PNG with these texts."""
    if path.suffix.lower() != ".png":
        return False
    try:
        with Image.open(path) as picture:
            return all(picture.info.get(key) == text for key, text in marks.items())
    # The file is no picture, or larger than Pillow's limit.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
