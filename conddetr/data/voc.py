"""Data sets in Pascal VOC's layout: an XML file for each image, as described by its development kit.

Corners of boxes count pixels from 1, and both corners belong to the box. Many tools count from 0 instead, and leave the
last pixel out. A coordinate below 1 anywhere in a data set shows this; then all its boxes are read like that.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from conddetr.data.annotations import Annotations
from conddetr.data.folders import is_image, packed, upright_sizes
from conddetr.files import read_text

log = logging.getLogger(__name__)

_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Possible folder names of each split."""
_ENCODING = re.compile(rb"""\s*<\?xml\s[^>]*?encoding\s*=\s*["']([A-Za-z][\w.-]*)""")
"""The declaration of an XML file's encoding."""
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    name: str
    corners: tuple[float, ...]
    """xmin, ymin, xmax, ymax as in the file."""
    is_difficult: bool


class _Record(NamedTuple):
    """The content of one XML file."""

    file: Path
    image: str
    """Name in the folder of the images."""
    size: tuple[int, int]
    """Height and width; 0, 0 if the file does not give them."""
    objects: list[_Object]


@dataclass(frozen=True)
class _Location:
    """Folders of a split's XML files and images."""

    annotations: Path
    images: Path
    members: Path | None = None
    """File with the list of a split's names, without suffixes; None: all XML files."""

    def records(self) -> Iterator[_Record]:
        names = sorted(entry.name for entry in self.images.iterdir() if is_image(entry.name))
        by_stem: dict[str, list[str]] = {}
        for name in names:
            by_stem.setdefault(Path(name).stem, []).append(name)
        files = self._files()
        for file in files:
            yield _read(file, self.images, by_stem)
        without = len(by_stem.keys() - {file.stem for file in files}) if self.members is None else 0
        if without:
            log.warning(
                "%s: no XML file for %d of %d images: they are left out.", self.annotations, without, len(names)
            )

    def _files(self) -> list[Path]:
        if self.members is None:
            return sorted(path for path in self.annotations.glob("*.xml") if not path.name.startswith("."))
        names = [line.strip() for line in read_text(self.members).splitlines()]
        return [self.annotations / f"{name}.xml" for name in names if name]


class VocData:
    """All splits of a data set, which share their classes and whether pixels count from 0 or 1."""

    def __init__(self, locations: dict[str, _Location]) -> None:
        self.locations = locations

    @cached_property
    def records(self) -> dict[str, list[_Record]]:
        """The content of all XML files, by split; errors as in `VocSplit.read`."""
        return {split: list(location.records()) for split, location in self.locations.items()}

    @cached_property
    def classes(self) -> dict[int, str]:
        """All names of objects in alphabetical order, by ids from 1 on."""
        return dict(enumerate(sorted({item.name for item in self._objects()}), 1))

    @cached_property
    def counts_from_0(self) -> bool:
        """Whether a corner below 1 shows that pixels do not count from 1 as in VOC's own files."""
        return any(min(item.corners) < 1 for item in self._objects())

    @property
    def note(self) -> str:
        """How pixels and difficult objects were read, in a few words."""
        reading = "from 0, as some corners are below 1" if self.counts_from_0 else "from 1, both corners in the box"
        difficult = sum(item.is_difficult for item in self._objects())
        counted = f"; objects marked difficult: {difficult}, used like all others" if difficult else ""
        return f"pixels count {reading}{counted}"

    def _objects(self) -> Iterator[_Object]:
        return (item for records in self.records.values() for record in records for item in record.objects)


@dataclass(frozen=True)
class VocSplit:
    """One part of a data set in Pascal VOC's layout."""

    images: Path
    """The folder of the images."""
    source: Path
    """The folder of the XML files."""
    split: str
    """`train`, `val` or `test`."""
    data: VocData = field(compare=False, repr=False)

    @property
    def note(self) -> str:
        """How the files were read; reads the data set."""
        return self.data.note

    def count(self) -> int:
        """Number of images; reads the data set."""
        return len(self.data.records[self.split])

    def read(self) -> Annotations:
        """Read all XML files of the data set, once. Sizes that they do not give are read from the images.

        Raises:
            FileNotFoundError: an XML file or an image does not exist.
            ValueError: a file is malformed, or there is none; names the file and the object.
        """
        records = self.data.records[self.split]
        if not records:
            raise ValueError(f"{self.source}: there are no XML files of the split {self.split!r}.")
        sizes = np.array([record.size for record in records], np.int32)
        unknown = np.flatnonzero((sizes == 0).any(1))
        sizes[unknown] = upright_sizes([self.images / records[position].image for position in unknown])
        objects = [(position, item) for position, record in enumerate(records) for item in record.objects]
        corners = np.array([item.corners for _, item in objects], np.float64).reshape(-1, 4)
        ids = {name: number for number, name in self.data.classes.items()}
        return packed(
            f"{self.source} ({self.split})",
            self.data.classes,
            [record.image for record in records],
            sizes,
            [position for position, _ in objects],
            [ids[item.name] for _, item in objects],
            _boxes(corners, self.data.counts_from_0),
        )


def _boxes(corners: np.ndarray, count_from_0: bool) -> np.ndarray:
    """[n, 4] xmin, ymin, xmax, ymax -> xywh in pixels from 0 on."""
    first = 0 if count_from_0 else 1
    return np.concatenate([corners[:, :2] - first, corners[:, 2:] - corners[:, :2] + first], 1)


def find_voc(root: Path) -> tuple[str, dict[str, VocSplit]] | None:
    """The files that identify a folder in Pascal VOC's layout, and its splits; None for another layout.

    Raises:
        ValueError: two folders belong to the same split.
    """
    if not root.is_dir():
        return None
    locations = {}
    whole = _folders(root)
    if whole:
        lists = root / "ImageSets" / "Main"
        locations = {
            split: _Location(*whole, lists / f"{split}.txt") for split in _SPLITS if (lists / f"{split}.txt").is_file()
        }
        if not locations:
            trainval = lists / "trainval.txt"
            locations["train"] = _Location(*whole, trainval if trainval.is_file() else None)
    for split, names in _SPLITS.items():
        matches = [name for name in names if not whole and (root / name).is_dir() and _folders(root / name)]
        if len(matches) > 1:
            raise ValueError(f"Folder {root}: {' and '.join(matches)} are the same split: rename or remove one.")
        if matches:
            locations[split] = _Location(*_folders(root / matches[0]))
    if not locations:
        return None
    data = VocData(locations)
    splits = {
        split: VocSplit(location.images, location.annotations, split, data) for split, location in locations.items()
    }
    first = next(iter(locations.values())).annotations
    return (first.relative_to(root) / "*.xml").as_posix(), splits


def _folders(folder: Path) -> tuple[Path, Path] | None:
    """The folders of XML files and of images: two subfolders, or the folder itself; names in upper or lower case."""
    entries = {entry.name.casefold(): entry for entry in sorted(folder.iterdir(), reverse=True)}
    annotations = entries.get("annotations", folder)
    images = folder if annotations == folder else entries.get("jpegimages", entries.get("images"))
    if images is None or not annotations.is_dir() or not images.is_dir():
        return None
    stems = {path.stem for path in annotations.glob("*.xml")}
    is_voc = any(is_image(entry.name) and entry.stem in stems for entry in images.iterdir()) if stems else False
    return (annotations, images) if is_voc else None


def _read(file: Path, images: Path, by_stem: dict[str, list[str]]) -> _Record:
    if not file.is_file():
        raise FileNotFoundError(f"Annotation file {file} does not exist.")
    try:
        root = _root(file)
    # ValueError, LookupError: unknown encodings.
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"Annotation file {file} is not XML: {error}.") from error
    if root.tag != "annotation":
        raise ValueError(f"Annotation file {file}: expected the element <annotation>, got <{root.tag}>.")
    height, width = (_side(file, root.findtext(f"size/{side}", "")) for side in ("height", "width"))
    objects = [_object(file, number, item) for number, item in enumerate(root.findall("object"), 1)]
    size = (height, width) if height and width else (0, 0)
    return _Record(file, _image_name(file, root.findtext("filename", "").strip(), images, by_stem), size, objects)


def _root(file: Path) -> ElementTree.Element:
    """The outermost element; raises the parser's errors, and ValueError or LookupError for encodings."""
    try:
        # Expat reads no external entities, and limits the expansion of internal ones.
        return ElementTree.parse(file).getroot()
    except ValueError:
        # Expat does not support multi-byte encodings such as GBK and Shift JIS; Python does.
        content = file.read_bytes()
        declared = _ENCODING.match(content)
        if declared is None:
            raise
        return ElementTree.fromstring(content.decode(declared[1].decode()))


def _image_name(file: Path, name: str, images: Path, by_stem: dict[str, list[str]]) -> str:
    """The image with the name of the XML file; the name in the file itself is often out of date."""
    matches = by_stem.get(file.stem, [])
    if len(matches) == 1:
        return matches[0]
    if name and (name in matches or (not matches and is_image(name) and (images / name).is_file())):
        return name
    if matches:
        raise ValueError(f"Annotation file {file}: its image is {' or '.join(matches)} in {images}: remove one.")
    raise FileNotFoundError(f"Annotation file {file}: its image does not exist: expected {file.stem}.* in {images}.")


def _side(file: Path, text: str) -> int:
    """Height or width; 0 if the text is empty."""
    if not text.strip():
        return 0
    side = _number(text)
    if side is None or side < 0 or side != int(side):
        raise ValueError(f"Annotation file {file}: size: expected a height and a width in pixels, got {text[:40]!r}.")
    return int(side)


def _object(file: Path, number: int, item: ElementTree.Element) -> _Object:
    prefix = f"Annotation file {file}, object {number}"
    name = item.findtext("name", "").strip()
    if not name:
        raise ValueError(f"{prefix}: has no name.")
    texts = [item.findtext(f"bndbox/{corner}", "") for corner in _CORNERS]
    corners = tuple(map(_number, texts))
    if None in corners:
        raise ValueError(
            f"{prefix} ({name}): bndbox: expected numbers {', '.join(_CORNERS)}, got {', '.join(texts)[:60]}."
        )
    xmin, ymin, xmax, ymax = corners
    if xmax < xmin or ymax < ymin:
        raise ValueError(
            f"{prefix} ({name}): bndbox: expected xmin ≤ xmax and ymin ≤ ymax, got {', '.join(map(str.strip, texts))}."
        )
    return _Object(name, corners, item.findtext("difficult", "0").strip() not in ("", "0"))


def _number(text: str) -> float | None:
    """The number, or None if the text is not a finite number below 2³¹."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < 2**31 else None
