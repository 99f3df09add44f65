"""Data sets in Pascal VOC's layout: an XML file for each image, as its development kit describes.

Corners of boxes are pixels that count from 1, and both belong to the box. Many tools write corners from 0 on instead,
without the last pixel. A coordinate below 1 anywhere in a data set shows it, and all its boxes are read so.
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
"""What folders may call each split."""
_ENCODING = re.compile(rb"""\s*<\?xml\s[^>]*?encoding\s*=\s*["']([A-Za-z][\w.-]*)""")
"""How an XML file says its encoding."""
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    name: str
    corners: tuple[float, ...]
    """xmin, ymin, xmax, ymax as in the file."""
    is_difficult: bool


class _Record(NamedTuple):
    """What one XML file says."""

    file: Path
    image: str
    """The file in the folder of the images."""
    size: tuple[int, int]
    """Height and width; 0, 0 where the file does not say."""
    objects: list[_Object]


@dataclass(frozen=True)
class _Place:
    """Where the XML files of a split are."""

    annotations: Path
    images: Path
    members: Path | None = None
    """The list of a split's names, without suffix; None: all XML files."""

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
    """All splits of a data set, which have their classes and their way to count pixels in common."""

    def __init__(self, places: dict[str, _Place]) -> None:
        self.places = places

    @cached_property
    def records(self) -> dict[str, list[_Record]]:
        """What all XML files say, by split; errors as `VocSplit.read`."""
        return {split: list(place.records()) for split, place in self.places.items()}

    @cached_property
    def classes(self) -> dict[int, str]:
        """All names of objects in their order, by ids from 1 on."""
        return dict(enumerate(sorted({item.name for item in self._objects()}), 1))

    @cached_property
    def counts_from_0(self) -> bool:
        """Whether a corner below 1 shows that boxes are not as in VOC's own files."""
        return any(min(item.corners) < 1 for item in self._objects())

    @property
    def note(self) -> str:
        """How the files were read, in a few words."""
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
        """How the data set was read; reads it."""
        return self.data.note

    def count(self) -> int:
        """How many images there are; reads the data set."""
        return len(self.data.records[self.split])

    def read(self) -> Annotations:
        """Read all XML files of the data set, once. Sizes are those that they say, else those of the images.

        Raises:
            FileNotFoundError: an XML file or an image is not there.
            ValueError: a file is not as it should be, or there is none; names the file and the object.
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
    """What shows that a folder has Pascal VOC's layout, and its splits; None where it has not.

    Raises:
        ValueError: two folders are the same split.
    """
    if not root.is_dir():
        return None
    places = {}
    whole = _place(root)
    if whole:
        lists = root / "ImageSets" / "Main"
        places = {
            split: _Place(*whole, lists / f"{split}.txt") for split in _SPLITS if (lists / f"{split}.txt").is_file()
        }
        if not places:
            both = lists / "trainval.txt"
            places["train"] = _Place(*whole, both if both.is_file() else None)
    for split, names in _SPLITS.items():
        found = [name for name in names if not whole and (root / name).is_dir() and _place(root / name)]
        if len(found) > 1:
            raise ValueError(f"Folder {root}: {' and '.join(found)} are two names of one split: rename or remove one.")
        if found:
            places[split] = _Place(*_place(root / found[0]))
    if not places:
        return None
    data = VocData(places)
    splits = {split: VocSplit(place.images, place.annotations, split, data) for split, place in places.items()}
    first = next(iter(places.values())).annotations
    return (first.relative_to(root) / "*.xml").as_posix(), splits


def _place(folder: Path) -> tuple[Path, Path] | None:
    """The folders of XML files and of images in a folder: two in it, or the folder itself; in any case of letters."""
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
    # ValueError, LookupError: encodings that are not known.
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"Annotation file {file} is not XML: {error}.") from error
    if root.tag != "annotation":
        raise ValueError(f"Annotation file {file}: expected the element <annotation>, got <{root.tag}>.")
    height, width = (_side(file, root.findtext(f"size/{side}", "")) for side in ("height", "width"))
    objects = [_object(file, place, item) for place, item in enumerate(root.findall("object"), 1)]
    size = (height, width) if height and width else (0, 0)
    return _Record(file, _image_name(file, root.findtext("filename", "").strip(), images, by_stem), size, objects)


def _root(file: Path) -> ElementTree.Element:
    """The outermost element; errors are the parser's, ValueError and LookupError those of encodings."""
    try:
        # Expat reads no external entities, and limits how far internal ones grow.
        return ElementTree.parse(file).getroot()
    except ValueError:
        # It knows no encodings of several bytes, such as GBK and Shift JIS; Python does.
        content = file.read_bytes()
        declared = _ENCODING.match(content)
        if declared is None:
            raise
        return ElementTree.fromstring(content.decode(declared[1].decode()))


def _image_name(file: Path, said: str, images: Path, by_stem: dict[str, list[str]]) -> str:
    """The image that has the name of the XML file; what the file itself says is often out of date."""
    found = by_stem.get(file.stem, [])
    if len(found) == 1:
        return found[0]
    if said and (said in found or (not found and is_image(said) and (images / said).is_file())):
        return said
    if found:
        raise ValueError(f"Annotation file {file}: its image is {' or '.join(found)} in {images}: remove one.")
    raise FileNotFoundError(f"Annotation file {file}: its image does not exist: expected {file.stem}.* in {images}.")


def _side(file: Path, text: str) -> int:
    """Height or width; 0 where there is none."""
    if not text.strip():
        return 0
    side = _number(text)
    if side is None or side < 0 or side != int(side):
        raise ValueError(f"Annotation file {file}: size: expected a height and a width in pixels, got {text[:40]!r}.")
    return int(side)


def _object(file: Path, place: int, item: ElementTree.Element) -> _Object:
    where = f"Annotation file {file}, object {place}"
    name = item.findtext("name", "").strip()
    if not name:
        raise ValueError(f"{where}: has no name.")
    texts = [item.findtext(f"bndbox/{corner}", "") for corner in _CORNERS]
    corners = tuple(map(_number, texts))
    if None in corners:
        raise ValueError(
            f"{where} ({name}): bndbox: expected numbers {', '.join(_CORNERS)}, got {', '.join(texts)[:60]}."
        )
    xmin, ymin, xmax, ymax = corners
    if xmax < xmin or ymax < ymin:
        raise ValueError(
            f"{where} ({name}): bndbox: expected xmin ≤ xmax and ymin ≤ ymax, got {', '.join(map(str.strip, texts))}."
        )
    return _Object(name, corners, item.findtext("difficult", "0").strip() not in ("", "0"))


def _number(text: str) -> float | None:
    """None where it is no finite number of a size that images have."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < 2**31 else None
