"""Folders of data sets on disk: their layout is detected by the names in them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

from conddetr.data.annotations import Annotations, read_annotations
from conddetr.data.voc import VocSplit, find_voc
from conddetr.data.yolo import YoloSplit, find_yolo

_EXPECTED = {
    "COCO 2017": "folders train2017 and val2017, and annotations/instances_train2017.json and …_val2017.json",
    "Roboflow COCO": "folders train, valid and test, each with _annotations.coco.json beside the images",
    "YOLO": "data.yaml (or another *.yaml) with `names` and paths under `train` and `val`; or classes.txt with folders "
    "images/train, labels/train, images/val and labels/val",
    "Pascal VOC": "Annotations/*.xml with JPEGImages or images, and ImageSets/Main/train.txt if there are splits; "
    "or folders train, valid and test, each with *.xml beside the images",
}
"""Folders and files of each layout."""
_LISTED = 12
"""Maximum number of a folder's names in a message."""
_LEVELS = 2
"""Number of parent folders that are searched for a data set."""
_SEARCHED = 100
"""Maximum number of a folder's entries that are searched for a data set."""


@dataclass(frozen=True)
class CocoSplit:
    """One part of a data set: a folder of images and an annotation file in COCO's format."""

    images: Path
    """The folder that names of images are relative to."""
    source: Path
    """The annotation file."""
    split: str
    """`train`, `val` or `test`."""

    note: ClassVar[str] = ""

    def count(self) -> None:
        """None: the number of images is unknown before the file is read."""
        return None

    def read(self) -> Annotations:
        """Read the file. A test set's file may lack annotations; errors as in `read_annotations`."""
        return read_annotations(self.source, needs_boxes=self.split != "test")


Split = CocoSplit | YoloSplit | VocSplit
"""One part of a data set: `images`, `source`, `split`, and `read()`, which returns its annotations."""


@dataclass(frozen=True)
class Layout:
    """A data set on disk."""

    name: str
    """COCO 2017, Roboflow COCO, YOLO or Pascal VOC."""
    root: Path
    marker: str
    """The file or folder that identified the layout, relative to `root`."""
    splits: Mapping[str, Split]
    """The existing splits, by `train`, `val` and `test`."""

    def describe(self) -> str:
        """One line for the user: the layout, the splits with known numbers of images, and how they are read."""
        parts, unit = [], " images"
        for name, split in self.splits.items():
            count = split.count()
            parts.append(name if count is None else f"{name} {count}{unit}")
            unit = unit if count is None else ""
        notes = dict.fromkeys(split.note for split in self.splits.values() if split.note)
        return "; ".join([f"data: {self.name} layout ({self.marker}): {', '.join(parts)}", *notes])


def find_layout(root: str | Path) -> Layout:
    """The layout of a folder, by the names in it. YOLO's YAML file is read, and `root` may be that file.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no layout fits, or more than one; names the expected and the actual files.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"Data set folder {root} does not exist.")
    if root.is_file() and root.suffix not in (".yaml", ".yml"):
        hint = " --images and --annotations take a folder and a file in COCO's format." * (root.suffix == ".json")
        raise ValueError(f"{root}: expected a data set folder or YOLO's YAML file, got another file.{hint}")
    detected = _layouts_of(root)
    if len(detected) > 1:
        both = " and ".join(f"{layout.name} ({layout.marker})" for layout in detected)
        raise ValueError(f"Folder {root} has more than one layout: {both}. Keep the files of one of them.")
    if not detected:
        expected = "\n".join(f"  {name}: {text}" for name, text in _EXPECTED.items())
        raise ValueError(
            f"{root} has no known layout of a data set.{_hint(root)} It has {_names_in(root)}. Expected one of:\n"
            f"{expected}"
        )
    return detected[0]


def _layouts_of(root: Path) -> list[Layout]:
    """All layouts of a folder, or of YOLO's YAML file."""
    finders: dict[str, Callable[[Path], tuple[str, Mapping[str, Split]] | None]] = {
        "COCO 2017": _find_coco2017,
        "Roboflow COCO": _find_roboflow,
        "YOLO": find_yolo,
        "Pascal VOC": find_voc,
    }
    return [Layout(name, root, *result) for name, find in finders.items() if (result := find(root))]


def _hint(root: Path) -> str:
    """A sentence about a data set in a folder above or below this one; empty if there is none."""
    if not root.is_dir():
        return ""
    here = root.resolve()
    children = _folders_in(root)
    grandchildren = [entry for folder in children for entry in _folders_in(folder)]
    for folder in (*here.parents[:_LEVELS], *children, *grandchildren[:_SEARCHED]):
        try:
            nearby = _layouts_of(folder)
        # Faults of another folder are not reported for this one.
        except (ValueError, OSError):
            continue
        if nearby:
            return f" Folder {folder} has the layout of {nearby[0].name} ({nearby[0].marker}): use it instead."
    return ""


def _folders_in(folder: Path) -> list[Path]:
    """The folders among a folder's first entries."""
    try:
        return sorted(entry for entry in islice(folder.iterdir(), _SEARCHED) if entry.is_dir())
    except OSError:
        return []


def _find_coco2017(root: Path) -> tuple[str, dict[str, CocoSplit]] | None:
    files = {"train": "instances_train2017", "val": "instances_val2017", "test": "image_info_test-dev2017"}
    splits = {}
    for split, name in files.items():
        images, source = root / f"{split}2017", root / "annotations" / f"{name}.json"
        if images.is_dir() and source.is_file():
            splits[split] = CocoSplit(images, source, split)
    return ("annotations/instances_*2017.json", splits) if splits else None


def _find_roboflow(root: Path) -> tuple[str, dict[str, CocoSplit]] | None:
    splits = {}
    for split, names in {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}.items():
        sources = [root / name / "_annotations.coco.json" for name in names]
        sources = [source for source in sources if source.is_file()]
        if len(sources) > 1:
            raise ValueError(f"{sources[0]} and {sources[1]} are two files of one split: remove one.")
        if sources:
            splits[split] = CocoSplit(sources[0].parent, sources[0], split)
    if not splits:
        return None
    return next(iter(splits.values())).source.relative_to(root).as_posix(), splits


def _names_in(root: Path) -> str:
    """The first names in a folder, folders with a slash; for a file, what it lacks."""
    if root.is_file():
        return f"no names of classes in {root.name}"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "no files") + more
