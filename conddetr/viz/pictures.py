"""Paths for drawn pictures and videos, which overwrite nothing but earlier drawings of the same source."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from conddetr.files import atomic_file
from conddetr.viz.boxes import save_figure
from conddetr.viz.marks import has_marks, marks


class PictureFolder:
    """A folder for pictures of images; saving replaces only an earlier picture of the same image.

    The metadata of a picture names the command and, as a hash of its path, the image (`conddetr.viz.marks`).
    """

    def __init__(self, folder: str | Path, command: str, sources: Sequence[str | Path]) -> None:
        """
        Args:
            folder: created if absent.
            command: name of the command that draws.
            sources: all images and videos that will be read; none of the files is replaced.

        Raises:
            NotADirectoryError: the folder is a file.
        """
        self.folder, self._command = Path(folder), command
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder}: expected a folder for pictures, got a file.")
        self._sources = {_identity(source) for source in sources if isinstance(source, Path)}

    def save(self, figure: Figure, image: Path, ending: str = "") -> Path:
        """Write the picture of an image, as PNG; returns its path.

        Its name is the image's name without suffix, then the ending; then `-2`, `-3`, … if the name is taken.
        """
        path = self._free(f"{image.stem}{ending}", ".png", self.marks(image))
        return save_figure(figure, path, marks=self.marks(image))

    def save_pixels(self, pixels: np.ndarray, image: Path) -> Path:
        """Write [H, W, 3] uint8 as the picture of an image, as `save` does."""
        path, texts = self._free(image.stem, ".png", self.marks(image)), PngInfo()
        for key, text in self.marks(image).items():
            texts.add_text(key, text)
        # A photo compresses little: the fastest level takes a third of the default's time and 3 % more bytes.
        with atomic_file(path) as partial:
            Image.fromarray(pixels).save(partial, format="PNG", compress_level=1, pnginfo=texts)
        return path

    def video(self, source: str | Path, name: str) -> Path:
        """The path for the drawn video of a source, an MP4 file. The caller marks it with `marks`.

        Args:
            source: a file; or a camera or an address, whose video is named `camera-0`, for example.
            name: of a source that is no file, as it may be shown.
        """
        stem = source.stem if isinstance(source, Path) else re.sub(r"\W+", "-", name).strip("-")
        return self._free(stem, ".mp4", self.marks(source))

    def marks(self, source: str | Path) -> dict[str, str]:
        """The texts that mark the picture of a source."""
        return marks(self._command, source)

    def _free(self, name: str, suffix: str, texts: dict[str, str]) -> Path:
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        paths = (self.folder / f"{name}{suffix}" for name in names)
        return next(path for path in paths if self._is_free(path, texts))

    def _is_free(self, path: Path, texts: dict[str, str]) -> bool:
        if not os.path.lexists(path):
            return True
        is_own_file = path.is_file() and not path.is_symlink() and _identity(path) not in self._sources
        return is_own_file and has_marks(path, texts)


def _identity(path: Path) -> tuple[int, int]:
    """Identity of a file, equal for all of its names."""
    status = path.stat()
    return status.st_dev, status.st_ino
