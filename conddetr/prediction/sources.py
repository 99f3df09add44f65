"""The images and videos that a command's words name: files, folders, patterns, cameras and network streams."""

import functools
import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from conddetr.engine.progress import say
from conddetr.viz.marks import has_marks, marks

NOT_DECODED = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow registers but cannot read."""
VIDEOS = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm", ".wmv")
"""Suffixes of video files."""
_ADDRESS = re.compile(r"camera:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
"""Beginning of a source that is no file: a camera, or an address of any protocol."""


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


def is_video(source: str | Path) -> bool:
    """Whether a source is a video file, a camera or a network stream, and not an image."""
    return isinstance(source, str) or source.suffix.lower() in VIDEOS


def find_sources(names: Sequence[str]) -> list[Path | str]:
    """Images and videos, in the order of the names, each once.

    Args:
        names: image files with any suffix; video files (`VIDEOS`); folders, of which the images directly inside are
            read; patterns as in a shell, with `**` for all subfolders, of which the images and videos are read;
            `camera:0`; addresses such as `rtsp://…`. Contents of folders and patterns are sorted by name, and pictures
            and videos that `predict` drew are skipped.

    Returns:
        Paths of files; cameras and addresses as they were given.

    Raises:
        FileNotFoundError: a file does not exist, or a folder or a pattern has nothing to read.
        ValueError: a camera without a number.
    """
    sources = [source for name in names for source in _sources_of(name)]
    once = dict.fromkeys(sources)
    if len(once) < len(sources):
        say(f"{len(sources) - len(once)} of {len(sources)} inputs are named twice: they are read once")
    return list(once)


def _sources_of(name: str) -> Sequence[Path | str]:
    path = Path(name)
    if _ADDRESS.match(name) and not path.exists():
        if name.lower().startswith("camera:") and not name[len("camera:") :].isdecimal():
            raise ValueError(f"Camera {name!r}: expected camera:N with a number N, for example camera:0.")
        return [name]
    if path.is_dir():
        return _images_in(path)
    # A file may have brackets in its name.
    if glob.has_magic(name) and not path.exists():
        return _matches(name)
    return [image_file(path)]


def _images_in(folder: Path) -> list[Path]:
    files = _visible(str(folder), folder.iterdir())
    images = [path for path in files if path.suffix.lower() in _image_suffixes()]
    kept = _without_drawn(str(folder), images, "images")
    videos = [path for path in files if is_video(path) and not has_marks(path, marks("predict"))]
    if not kept:
        content = f"{len(files)} files" + (f", {len(images)} of them drawn by predict" if images else "")
        content += f", {len(videos)} of them videos: name those to read them" if videos else ""
        raise FileNotFoundError(f"Folder {folder} contains no image: {content}. Subfolders are not searched.")
    if videos:
        say(f"{folder}: {len(videos)} videos are not read, first {videos[0].name}: name them to read them")
    return kept


def _matches(pattern: str) -> list[Path]:
    files = _visible(pattern, map(Path, glob.iglob(pattern, recursive=True)))
    known = [path for path in files if path.suffix.lower() in _image_suffixes() or is_video(path)]
    kept = _without_drawn(pattern, known, "images and videos")
    if not kept:
        content = f"{len(files)} files" + (f", {len(known)} of them drawn by predict" if known else "")
        raise FileNotFoundError(f"Pattern {pattern} matches no image or video: {content}.")
    if len(known) < len(files):
        say(f"{pattern}: of {len(files)} files, {len(files) - len(known)} are no images or videos and are skipped")
    return kept


def _visible(where: str, paths: Iterable[Path]) -> list[Path]:
    """Files, sorted; a line says how many links have no target.

    Files whose names begin with a dot hold metadata of other systems, not images.
    """
    visible = sorted(path for path in paths if not path.name.startswith("."))
    if broken := sum(path.is_symlink() and not path.exists() for path in visible):
        say(f"{where}: {broken} links whose files do not exist are skipped")
    return [path for path in visible if path.is_file()]


def _without_drawn(where: str, files: list[Path], kind: str) -> list[Path]:
    """The files that `predict` did not draw; a line says how many it did."""
    kept = [path for path in files if not has_marks(path, marks("predict"))]
    if kept and len(kept) < len(files):
        say(f"{where}: of {len(files)} {kind}, {len(files) - len(kept)} drawn by predict are skipped")
    return kept


@functools.cache
def _image_suffixes() -> frozenset[str]:
    Image.init()
    suffixes = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in suffixes if name in Image.OPEN.keys() - NOT_DECODED)
