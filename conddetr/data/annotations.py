"""Annotation files in COCO's format, read once and kept as arrays, without a Python object for every box.

A file of COCO's size has a million objects with their polygons. `conddetr.data.stream` reads it part by part and
decodes only the needed fields. If a part holds a malformed entry, its entries are checked one by one.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from conddetr.files import decode_text
from conddetr.garbage import collection_paused

try:
    from conddetr.data import stream
except ModuleNotFoundError:
    # Without msgspec, Python's own reader is used. It takes ten times the time and memory.
    stream = None

_LIMIT = 2**31


@dataclass(slots=True)
class _Image:
    id: int
    file_name: str
    height: int | None = None
    width: int | None = None


@dataclass(slots=True)
class _Annotation:
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | None = None


@dataclass(slots=True)
class _Category:
    id: int
    name: str


SECTIONS = {"images": _Image, "annotations": _Annotation, "categories": _Category}
"""The lists of an annotation file, with the fields that are read from their entries."""


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -_LIMIT < value < _LIMIT


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    # NaN fails both comparisons, and integers of any length can be compared.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LIMIT < value < _LIMIT


def _is_box(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(map(_is_number, value))


def _is_side(value: Any) -> bool:
    """Whether it is a valid height or width; None, 0 and -1 mean an unknown size (VIA writes -1)."""
    return value is None or (_is_integer(value) and value >= -1)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (_is_id, "an integer ≥ 0"),
    "image_id": (_is_id, "an integer ≥ 0"),
    "category_id": (_is_id, "an integer ≥ 0"),
    # No file name contains a null byte.
    "file_name": (lambda value: isinstance(value, str) and value != "" and "\0" not in value, "a file name"),
    "name": (lambda value: isinstance(value, str), "a text"),
    "height": (_is_side, "a positive integer"),
    "width": (_is_side, "a positive integer"),
    "bbox": (_is_box, "4 finite numbers"),
    "area": (lambda value: value is None or _is_number(value), "a finite number"),
    "iscrowd": (lambda value: value is None or value in (0, 1), "0 or 1"),
}
"""The check of each field's value, with the description of a valid one."""


def entry_fault(section: str, entry: Any) -> str | None:
    """The first fault of an entry of a section, or None if it is valid."""
    if not isinstance(entry, dict):
        return f"expected an object, got {type(entry).__name__}"
    fields = SECTIONS[section].__dataclass_fields__
    absent = [name for name, declared in fields.items() if name not in entry and declared.default is not None]
    if absent:
        return f"has no {absent[0]!r}"
    for name in fields:
        is_valid, expected = _CHECKS[name]
        if name in entry and not is_valid(entry[name]):
            return f"{name}: expected {expected}, got {repr(entry[name])[:60]}"
    return None


class Names(Sequence[str]):
    """A list of texts as bytes: a million `str` would be copied into every worker process, page by page."""

    def __init__(self, texts: Iterable[str]) -> None:
        # JSON can hold half a surrogate pair, which is not valid UTF-8.
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._ends = np.fromiter(map(len, encoded), np.int64, len(encoded)).cumsum()
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].tobytes().decode("utf-8", "surrogatepass")


@dataclass
class Annotations:
    """I images with N annotated boxes; the boxes of an image are adjacent, in the order of the file."""

    source: str
    """Where the annotations come from, for messages."""
    categories: list[dict[str, Any]]
    """`id` and `name`, in the order of the file."""
    image_ids: np.ndarray
    """[I] int64."""
    names: Sequence[str]
    """I file names, relative to the folder of the images."""
    sizes: np.ndarray
    """[I, 2] int32, height and width in pixels; 0, 0 if the file does not give them."""
    ids: np.ndarray
    """[N] int64, ids of the annotations."""
    image_of: np.ndarray
    """[N] int32, ascending: position of the image of each box."""
    category_of: np.ndarray
    """[N] int32, position of the category of each box in `categories`."""
    boxes: np.ndarray
    """[N, 4] float64, xywh in pixels of the image."""
    areas: np.ndarray
    """[N] float64, areas of the objects in pixels; the area of a mask is smaller than its box's."""
    crowds: np.ndarray
    """[N] bool."""
    is_annotated: bool = True
    """Whether the file has a list of annotations; test sets have none."""

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def offsets(self) -> np.ndarray:
        """[I + 1] int64: the boxes of image i are `offsets[i]` to `offsets[i + 1]`."""
        return np.searchsorted(self.image_of, np.arange(len(self) + 1))

    def select(self, positions: np.ndarray) -> "Annotations":
        """The annotations of the images at some positions [n], in that order."""
        starts = self.offsets
        counts = starts[positions + 1] - starts[positions]
        first = np.repeat(starts[positions] - (counts.cumsum() - counts), counts)
        boxes = first + np.arange(counts.sum())
        return replace(
            self,
            image_ids=self.image_ids[positions],
            names=Names(self.names[position] for position in positions.tolist()),
            sizes=self.sizes[positions],
            ids=self.ids[boxes],
            image_of=np.repeat(np.arange(len(positions), dtype=np.int32), counts),
            category_of=self.category_of[boxes],
            boxes=self.boxes[boxes],
            areas=self.areas[boxes],
            crowds=self.crowds[boxes],
        )

    def to_coco(self) -> dict[str, Any]:
        """Lists and dicts in COCO's format; without the key `annotations` for test sets."""
        images = [
            {"id": image_id, "file_name": name, "height": height, "width": width}
            for image_id, name, (height, width) in zip(
                self.image_ids.tolist(), self.names, self.sizes.tolist(), strict=True
            )
        ]
        content = {"images": images, "categories": [dict(category) for category in self.categories]}
        if self.is_annotated:
            image_ids, category_ids = self.image_ids.tolist(), [category["id"] for category in self.categories]
            columns = (self.ids, self.image_of, self.category_of, self.boxes, self.areas, self.crowds.astype(int))
            content["annotations"] = [
                {
                    "id": key,
                    "image_id": image_ids[image],
                    "category_id": category_ids[category],
                    "bbox": box,
                    "area": area,
                    "iscrowd": crowd,
                }
                for key, image, category, box, area, crowd in zip(*(c.tolist() for c in columns), strict=True)
            ]
        return content


@dataclass
class Scan:
    """The content of an annotation file: its valid entries, and all its faults."""

    annotations: Annotations
    """The valid entries. If an id is repeated within a list, its last entry is used."""
    missing: list[str] = field(default_factory=list)
    """Keys that are missing, or whose values are not lists."""
    malformed: dict[str, list[str]] = field(default_factory=dict)
    """By list, the entries that do not follow the format: position and fault."""
    repeated: dict[str, list[int]] = field(default_factory=dict)
    """By list, the ids that occur more than once."""
    unknown_category: list[str] = field(default_factory=list)
    """Annotations of categories that are not in the file."""
    unknown_image: list[str] = field(default_factory=list)
    """Annotations of images that are not in the file."""

    def first_fault(self) -> str | None:
        """The first fault to fix, in one sentence, or None."""
        for section in SECTIONS:
            if section in self.missing:
                return f"expected a list under the key {section!r}."
            if self.malformed[section]:
                return f"{self.malformed[section][0]}."
            if self.repeated[section]:
                return f"id {self.repeated[section][0]} occurs more than once in {section!r}."
        if self.unknown_category:
            return f"{self.unknown_category[0]}, which is not in 'categories'."
        return f"{self.unknown_image[0]}, which is not in 'images'." if self.unknown_image else None


def read_annotations(path: str | Path, needs_boxes: bool = True) -> Annotations:
    """Read a COCO annotation file and check all fields that the detector uses.

    `iscrowd` and `area` may be missing or null: they become 0 and the area of the box. Sizes of images may be missing,
    null or -1: they become 0.

    Args:
        path: the file, in UTF-8, or another Unicode encoding with a byte order mark.
        needs_boxes: refuse a file without a list `annotations`, for example a test set's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON or not in COCO's format; names the file, the entry and the actual value.
    """
    result = scan(path)
    fault = result.first_fault()
    if fault is None and needs_boxes and not result.annotations.is_annotated:
        fault = "expected a list under the key 'annotations'."
    if fault:
        raise ValueError(f"Annotation file {path}: {fault}")
    return result.annotations


def scan(path: str | Path) -> Scan:
    """Read an annotation file and collect all its faults.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"Annotation file {path} is a folder: name the JSON file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"Annotation file {path} does not exist.")
    lists = _quick_lists(path)
    if lists is None:
        lists, missing = _plain_lists(path)
    else:
        missing = []
    is_annotated = "annotations" in lists
    missing += [name for name in ("images", "categories") if name not in lists and name not in missing]
    malformed = {name: lists[name].faults if name in lists else [] for name in SECTIONS}
    columns = {name: (lists.pop(name, None) or _List(name)).columns() for name in SECTIONS}
    repeated = {name: _repeated(columns[name]["id"]) for name in SECTIONS}
    result = Scan(_empty(str(path), is_annotated), missing, malformed, repeated)
    _resolve_references(result, *columns.values())
    return result


def _quick_lists(path: Path) -> "dict[str, _List] | None":
    """The lists by name, without missing ones; None if only Python's own reader can read the file."""
    if stream is None:
        return None
    lists: dict[str, _List] = {}
    try:
        with collection_paused():
            for name, items in stream.lists_of(path, SECTIONS):
                lists.setdefault(name, _List(name)).add(items)
    except stream.UnusualError:
        return None
    return lists


def read_object(path: Path) -> dict[str, Any]:
    """The whole content of an annotation file, from Python's own reader.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not an object, or with a repeated key.
    """
    # Keys of the object that ended last, which finally is the outermost one.
    repeated: set[str] = set()

    def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        repeated.clear()
        if len(mapping) < len(pairs):
            repeated.update(key for key in mapping if sum(key == name for name, _ in pairs) > 1)
        return mapping

    raw = path.read_bytes()
    try:
        content = json.loads(decode_text(raw), object_pairs_hook=entries)
    # A deeply nested file exhausts the parser's stack.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Annotation file {path} is not JSON: {_looks_like(raw) or error}.") from error
    if not isinstance(content, dict):
        results = ", as in a results file: annotations have 'images', 'annotations' and 'categories'"
        raise ValueError(
            f"Annotation file {path}: expected an object, got {type(content).__name__}"
            f"{results if isinstance(content, list) else ''}."
        )
    if repeated:
        raise ValueError(
            f"Annotation file {path}: {', '.join(map(repr, sorted(repeated)))} is repeated in the outermost object, "
            "and readers use one or the other: join them, or remove one."
        )
    return content


def _plain_lists(path: Path) -> "tuple[dict[str, _List], list[str]]":
    """As `_quick_lists`, from Python's own reader; with the names of the sections that are not lists."""
    content = read_object(path)
    lists, missing = {}, []
    for name in SECTIONS:
        if isinstance(content.get(name), list):
            lists[name] = _List(name)
            lists[name].add(content[name])
        elif name in content:
            missing.append(name)
    return lists, missing


def _looks_like(raw: bytes) -> str | None:
    """The format of a file that is not JSON and how to fix it, if its first bytes show it; else None."""
    if not raw.strip():
        return "the file is empty"
    for start, text in _OTHER_FILES.items():
        if raw.startswith(start):
            return text
    return None


_OTHER_FILES = {
    b"\x1f\x8b": "it is compressed with gzip: unpack it",
    b"PK\x03\x04": "it is a ZIP archive: unpack it",
    b"version https://git-lfs": "it is a Git LFS pointer without the content: run `git lfs pull`",
}
"""By their first bytes, files that users pass instead of JSON."""


class _List:
    """One list of a file while it is read: the fields of its valid entries in arrays, and the faults of the others."""

    def __init__(self, section: str) -> None:
        self.section, self.count = section, 0
        self.faults: list[str] = []
        self._chunks = [_columns(section, [])]

    def add(self, items: list) -> None:
        """Append entries: objects of the section's class, JSON texts (`Raw`) or decoded values."""
        kind = SECTIONS[self.section]
        columns = _valid_columns(self.section, items) if items and isinstance(items[0], kind) else None
        if columns is None:
            columns = _columns(self.section, self._valid_entries(items))
        self.count += len(items)
        self._chunks.append(columns)

    def _valid_entries(self, items: list) -> list:
        kind, valid = SECTIONS[self.section], []
        for position, item in enumerate(items, self.count):
            content = asdict(item) if isinstance(item, kind) else _plain(item)
            fault = entry_fault(self.section, content)
            if fault is None:
                valid.append(kind(**{name: content[name] for name in kind.__dataclass_fields__ if name in content}))
            else:
                label = f" (id {content['id']})" if isinstance(content, dict) and "id" in content else ""
                self.faults.append(f"{self.section}[{position}]{label}: {fault}")
        return valid

    def columns(self) -> dict[str, Any]:
        """Each field of all valid entries; the list gives up its own copy."""
        packed = {}
        for name in list(self._chunks[0]):
            parts = [chunk.pop(name) for chunk in self._chunks]
            is_number = isinstance(parts[0], np.ndarray)
            packed[name] = np.concatenate(parts) if is_number else list(chain.from_iterable(parts))
        return packed


def _plain(item: Any) -> Any:
    """An entry as Python's reader returns it."""
    return json.loads(bytes(item)) if stream is not None and isinstance(item, stream.Raw) else item


def _valid_columns(section: str, entries: list) -> dict[str, Any] | None:
    """The fields of entries that have the right types; None if a value is out of range."""
    try:
        columns = _columns(section, entries)
    except OverflowError:
        return None
    return columns if all(_in_range(name, values) for name, values in columns.items()) else None


def _in_range(name: str, values: np.ndarray | list[str]) -> bool:
    """Whether all values meet `_CHECKS`; their types are right already."""
    if name == "file_name":
        return all(text and "\0" not in text for text in values)
    if name == "iscrowd":
        return bool(((values == 0) | (values == 1)).all())
    if name in ("height", "width"):
        return bool(((values >= -1) & (values < _LIMIT)).all())
    if name in ("bbox", "area"):
        return bool((np.abs(values) < _LIMIT).all())
    return name == "name" or bool((values >= 0).all())


def _columns(section: str, entries: list) -> dict[str, Any]:
    """Each field of all entries, numbers in one array; optional fields get their defaults."""

    def column(name: str, dtype: type = np.int64) -> np.ndarray:
        return np.fromiter(map(attrgetter(name), entries), dtype, len(entries))

    def optional(name: str, dtype: type, default: float) -> np.ndarray:
        values = (default if value is None else value for value in map(attrgetter(name), entries))
        return np.fromiter(values, dtype, len(entries))

    if section == "categories":
        return {"id": column("id"), "name": [entry.name for entry in entries]}
    if section == "images":
        sides = {side: optional(side, np.int64, 0) for side in ("height", "width")}
        return {"id": column("id"), "file_name": [entry.file_name for entry in entries], **sides}
    numbers = chain.from_iterable(entry.bbox for entry in entries)
    boxes = np.fromiter(numbers, np.float64, 4 * len(entries)).reshape(-1, 4)
    areas = optional("area", np.float64, np.nan)
    areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    ids = {name: column(name) for name in ("id", "image_id", "category_id")}
    return {**ids, "bbox": boxes, "area": areas, "iscrowd": optional("iscrowd", np.int8, 0)}


def _repeated(ids: np.ndarray) -> list[int]:
    values, counts = np.unique(ids, return_counts=True)
    return values[counts > 1].tolist()


def _empty(source: str, is_annotated: bool) -> Annotations:
    """Annotations without images."""
    no_ids, none = np.empty(0, np.int64), np.empty(0, np.int32)
    boxes, areas = np.empty((0, 4)), np.empty(0)
    sizes = np.empty((0, 2), np.int32)
    return Annotations(
        source, [], no_ids, Names([]), sizes, no_ids, none, none, boxes, areas, np.empty(0, bool), is_annotated
    )


def _resolve_references(result: Scan, images: dict, annotations: dict, categories: dict) -> None:
    """Fill in the annotations of a scan, and the references to unknown ids."""
    kept = _last_of_each(images["id"])
    known = _last_of_each(categories["id"])
    image_of, is_image = _positions(images["id"][kept], annotations["image_id"])
    category_of, is_category = _positions(categories["id"][known], annotations["category_id"])
    for name, is_known, messages in (
        ("category_id", is_category, result.unknown_category),
        ("image_id", is_image, result.unknown_image),
    ):
        unknown = np.flatnonzero(~is_known)
        for key, value in zip(annotations["id"][unknown].tolist(), annotations[name][unknown].tolist(), strict=True):
            messages.append(f"annotation id {key} has {name} {value}")
    order = np.argsort(image_of, kind="stable")
    order = order[(is_image & is_category)[order]]
    sizes = np.stack([images["height"], images["width"]], 1)[kept]
    # One side alone is not a size.
    sizes[(sizes <= 0).any(1)] = 0
    result.annotations = Annotations(
        result.annotations.source,
        [{"id": int(categories["id"][position]), "name": categories["name"][position]} for position in known],
        images["id"][kept],
        Names(images["file_name"][position] for position in kept),
        sizes.astype(np.int32),
        annotations["id"][order],
        image_of[order].astype(np.int32),
        category_of[order].astype(np.int32),
        annotations["bbox"][order],
        annotations["area"][order],
        annotations["iscrowd"][order].astype(bool),
        result.annotations.is_annotated,
    )


def _last_of_each(ids: np.ndarray) -> np.ndarray:
    """Positions of the last entry of each id, ascending."""
    _, last = np.unique(ids[::-1], return_index=True)
    return np.sort(len(ids) - 1 - last)


def _positions(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of each id of `wanted` in `known`, whose ids are unique, and whether it is there."""
    if not len(known):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    order = np.argsort(known, kind="stable")
    positions = order[np.searchsorted(known[order], wanted).clip(max=len(known) - 1)]
    return positions, known[positions] == wanted
