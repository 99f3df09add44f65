"""Data sets in YOLO's layout, detected and read as Ultralytics does.

A text file for each image has a line for each object: its class number, then `cx cy w h` or the corners of a polygon in
fractions of the upright image. A polygon becomes its box.
"""

import logging
import os
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from conddetr.data.annotations import Annotations
from conddetr.data.folders import images_below, packed, relative_names, upright_sizes
from conddetr.files import read_text

log = logging.getLogger(__name__)

_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Possible names of each split, as keys of a YAML file or as folders in `images`."""
_TOLERANCE = 0.01
"""By how much fractions may exceed [0, 1] because of rounding; the same as in Ultralytics."""


@dataclass(frozen=True)
class YoloSplit:
    """One part of a data set in YOLO's layout."""

    images: Path
    """The folder that names of images are relative to."""
    source: Path
    """The file that names the classes."""
    split: str
    """`train`, `val` or `test`."""
    places: tuple[Path, ...]
    """Folders of images, and text files that list images."""
    classes: dict[int, str]
    """Names by number."""
    pose_numbers: int | None = None
    """Numbers in a line if points of a pose follow each box."""

    note: ClassVar[str] = ""

    @cached_property
    def files(self) -> list[Path]:
        """The images: of a folder sorted by name, of a list in its order.

        Raises:
            ValueError: there are no images.
        """
        files = [
            file for place in self.places for file in (images_below(place) if place.is_dir() else self._listed(place))
        ]
        if not files:
            places = ", ".join(map(str, self.places))
            raise ValueError(f"{self.source}: {self.split}: there are no images in {places}.")
        return files

    def count(self) -> int:
        """Number of images."""
        return len(self.files)

    def read(self) -> Annotations:
        """Read all label files, and the sizes of all images from their headers. Images without a label file have no
        objects.

        Raises:
            FileNotFoundError: an image in a list does not exist.
            ValueError: no image has a label file, or a file is malformed; names the file and the line.
        """
        image_of, classes, fractions, missing = [], [], [], 0
        for position, file in enumerate(self.files):
            label = label_path(file)
            if not label.is_file():
                missing += 1
                continue
            for number, box in self._objects(label):
                image_of.append(position)
                classes.append(number)
                fractions.append(box)
        self._report_missing(missing)
        sizes = upright_sizes(self.files)
        scale = np.tile(sizes[image_of, ::-1], 2)
        boxes = np.array(fractions, np.float64).reshape(-1, 4) * scale
        names = relative_names(self.files, self.images)
        source = f"{self.source} ({self.split})"
        return packed(source, self.classes, names, sizes, image_of, classes, boxes, missing < len(self.files))

    def _listed(self, file: Path) -> list[Path]:
        """The images of a text file, whose paths are relative to its folder or to the data set's."""
        listed = []
        for number, line in enumerate(map(str.strip, _text(file).splitlines()), 1):
            spellings = (line, line.replace("\\", "/")) if line else ()
            paths = [folder / spelling for spelling in spellings for folder in (file.parent, self.images)]
            existing = [path for path in paths if path.is_file()]
            if paths and not existing:
                raise FileNotFoundError(f"{file}, line {number}: image file {paths[0]} does not exist, nor {paths[1]}.")
            listed += existing[:1]
        return listed

    def _report_missing(self, count: int) -> None:
        if count == len(self.files) and self.split != "test":
            raise ValueError(
                f"{self.source}: {self.split}: none of {count} images has a label file. The label file of "
                f"{self.files[0]} is expected at {label_path(self.files[0])}."
            )
        if count:
            log.warning(
                "%s: %s: no label file for %d of %d images: they have no objects.",
                self.source,
                self.split,
                count,
                len(self.files),
            )

    def _objects(self, label: Path) -> list[tuple[int, tuple[float, ...]]]:
        """Class and box of each line; see `_parsed`."""
        objects = []
        for number, line in enumerate(_text(label).splitlines(), 1):
            if line.strip():
                try:
                    objects.append(self._parsed(line.split()))
                except ValueError as error:
                    raise ValueError(f"Label file {label}, line {number}: {error}") from error
        return objects

    def _parsed(self, words: list[str]) -> tuple[int, tuple[float, ...]]:
        """Class, and x, y of the upper left corner, w, h of a line, in fractions."""
        is_box = len(words) in (5, self.pose_numbers)
        if not is_box and (self.pose_numbers or len(words) < 7 or len(words) % 2 == 0):
            points = (
                f"{self.pose_numbers} numbers with points" if self.pose_numbers else "a polygon of 3 or more points x y"
            )
            hint = " A sixth number may be the score of a detection, which is not a label." * (len(words) == 6)
            raise ValueError(f"expected a class and cx cy w h, or {points}, got {len(words)} numbers.{hint}")
        try:
            number, *values = map(float, words)
        except ValueError as error:
            raise ValueError(f"expected numbers, got {' '.join(words)[:60]!r}.") from error
        if number not in self.classes:
            raise ValueError(f"expected a class of {self.source}, which has {_numbers(self.classes)}, got {words[0]}.")
        values = values[:4] if is_box else values
        outside = [value for value in values if not -_TOLERANCE <= value <= 1 + _TOLERANCE]
        if outside or (is_box and min(values[2:]) < 0):
            raise ValueError(
                f"expected fractions of the image's width and height, from 0 to 1, got {min(outside or values):g}."
            )
        if is_box:
            x, y, w, h = values
            return int(number), (x - w / 2, y - h / 2, w, h)
        left, top = min(values[::2]), min(values[1::2])
        return int(number), (left, top, max(values[::2]) - left, max(values[1::2]) - top)


def label_path(image: Path) -> Path:
    """The label file of an image: with its last folder `images` replaced by `labels`, or beside the image."""
    parts = list(Path(os.path.abspath(image)).parts)
    folders = [position for position, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def find_yolo(root: Path) -> tuple[str, dict[str, YoloSplit]] | None:
    """The file that identifies a folder (or its YAML file) in YOLO's layout, and its splits; None for another layout.

    Raises:
        ValueError: there is such a YAML file, or a list of classes, but it is unusable.
    """
    result = _described(root)
    if result is None and root.is_dir():
        result = _undescribed(root)
    return result


def _described(root: Path) -> tuple[str, dict[str, YoloSplit]] | None:
    """The splits of a YAML file."""
    files = sorted(root.iterdir()) if root.is_dir() else [root]
    files = [file for file in files if file.suffix in (".yaml", ".yml")]
    contents = {file: content for file in files if "names" in (content := _yaml(file))}
    usual = [file for file in contents if file.stem in ("data", "dataset")]
    chosen = usual or list(contents)
    if len(chosen) > 1:
        raise ValueError(
            f"Folder {root} has more than one YAML file with names of classes: "
            f"{', '.join(file.name for file in chosen)}. Pass one of them instead of the folder."
        )
    if not chosen:
        return None
    file, content = chosen[0], contents[chosen[0]]
    classes, numbers = _classes(file, content), _pose_numbers(file, content)
    bases = list(dict.fromkeys((file.parent / _value(content, "path"), file.parent)))
    splits = {}
    for split, keys in _KEYS.items():
        entries = _entries(file, content, keys)
        places = [_source(file, split, entry, bases) for entry in entries]
        # Exports often name a test set that does not exist.
        if entries and not (split == "test" and None in places):
            images = places[0] if len(places) == 1 and places[0].is_dir() else _first_folder(bases)
            splits[split] = YoloSplit(images, file, split, tuple(places), classes, numbers)
    if not splits:
        raise ValueError(f"{file}: expected paths of images under `train` and `val`, got keys {', '.join(content)}.")
    return file.name, splits


def _undescribed(root: Path) -> tuple[str, dict[str, YoloSplit]] | None:
    """The splits in folders `images` and `labels` with a list of classes."""
    images, labels = root / "images", root / "labels"
    files = [root / "classes.txt", labels / "classes.txt"]
    splits = {}
    for split, names in _KEYS.items():
        folders = [images / name for name in names if (images / name).is_dir() and (labels / name).is_dir()]
        if folders:
            splits[split] = folders
            files += [labels / folder.name / "classes.txt" for folder in folders]
    if not splits and images.is_dir() and labels.is_dir():
        splits["train"] = [images]
    files = [file for file in files if file.is_file()]
    if not splits or not files:
        return None
    classes = [_listed_classes(file) for file in files]
    for file, listed in zip(files[1:], classes[1:], strict=True):
        if listed != classes[0]:
            raise ValueError(f"{files[0]} and {file} list different classes: keep the right one.")
    result = {
        split: YoloSplit(folders[0] if len(folders) == 1 else images, files[0], split, tuple(folders), classes[0])
        for split, folders in splits.items()
    }
    return str(files[0].relative_to(root)), result


def _listed_classes(file: Path) -> dict[int, str]:
    names = [line.strip() for line in _text(file).rstrip().splitlines()]
    if "" in names or not names:
        raise ValueError(
            f"{file}: expected the name of a class in each line, but line {(*names, '').index('') + 1} is empty."
        )
    return dict(enumerate(names))


def _yaml(file: Path) -> dict[str, Any]:
    """The content of a YAML file, all scalars as texts; empty if it is not a mapping."""
    import yaml

    try:
        # Not SafeLoader, for which names such as `no` and `010` are a bool and a number.
        content = yaml.load(_text(file), yaml.BaseLoader)
    except yaml.YAMLError as error:
        if file.stem not in ("data", "dataset"):
            return {}
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}.") from error
    return content if isinstance(content, dict) else {}


def _value(content: dict[str, Any], key: str) -> Any:
    """A value, or an empty text if there is none."""
    value = content.get(key, "")
    return "" if value in ("null", "~") else value


def _classes(file: Path, content: dict[str, Any]) -> dict[int, str]:
    names = content["names"]
    if isinstance(names, list):
        names = {str(number): name for number, name in enumerate(names)}
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{file}: names: expected a list of names, or names by number, got {str(names)[:60]}.")
    if not all(number.isdecimal() for number in names):
        raise ValueError(f"{file}: names: expected class numbers from 0 on, got {', '.join(names)[:60]}.")
    count = _value(content, "nc")
    if count and count != str(len(names)):
        raise ValueError(f"{file}: nc is {count}, but there are {len(names)} names.")
    return dict(sorted((int(number), name) for number, name in names.items()))


def _pose_numbers(file: Path, content: dict[str, Any]) -> int | None:
    shape = _value(content, "kpt_shape")
    if not shape:
        return None
    if not isinstance(shape, list) or not all(isinstance(side, str) and side.isdecimal() for side in shape):
        raise ValueError(f"{file}: kpt_shape: expected two numbers, got {shape}.")
    return 5 + prod(map(int, shape))


def _entries(file: Path, content: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """The paths of a split."""
    given = [key for key in keys if _value(content, key)]
    if len(given) > 1:
        raise ValueError(f"{file}: {' and '.join(given)} are the same split: remove one.")
    value = content[given[0]] if given else []
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{file}: {given[0]}: expected a path or a list of paths, got {str(value)[:60]}.")
    return entries


def _source(file: Path, split: str, entry: str, bases: list[Path]) -> Path | None:
    """The folder or list of an entry; None for a test set that does not exist."""
    tried = []
    for spelling in dict.fromkeys((entry, entry.replace("\\", "/"))):
        for base in bases:
            # Roboflow writes `../train/images` for a folder beside its YAML file.
            paths = list(dict.fromkeys(base / path for path in (spelling, spelling.removeprefix("../"))))
            existing = [path for path in paths if path.is_dir() or (path.suffix == ".txt" and path.is_file())]
            if len({path.resolve() for path in existing}) > 1:
                raise ValueError(
                    f"{file}: {split}: {entry} could be {existing[0].resolve()} or {existing[1].resolve()}: write an "
                    "absolute path."
                )
            if existing:
                return Path(os.path.normpath(existing[0]))
            tried += paths
    if split == "test":
        return None
    raise ValueError(
        f"{file}: {split}: expected a folder of images, or a list of images in a .txt file, got {entry}. "
        f"Searched for {', '.join(dict.fromkeys(os.path.normpath(path) for path in tried))}."
    )


def _first_folder(paths: list[Path]) -> Path:
    return next(path for path in paths if path.is_dir())


def _numbers(classes: dict[int, str]) -> str:
    first, last = min(classes), max(classes)
    whole = len(classes) == last - first + 1
    return f"classes {first} to {last}" if whole else f"classes {', '.join(map(str, classes))}"[:80]


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except ValueError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}.") from error
