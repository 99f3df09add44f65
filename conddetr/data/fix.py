"""A cleaned copy of an annotation file: unusable entries are dropped, the others are repaired, all changes are listed.

It works on the JSON itself, so all other content of the file and of the remaining entries is kept.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from conddetr.data.annotations import SECTIONS, entry_fault, read_object, scan
from conddetr.data.boxes import box_readings, reaches_out
from conddetr.data.validate import Files, ValidationReport, file_findings, is_unusable, judge
from conddetr.files import atomic_file, refuse_overwriting

_PASSES = 10
"""Maximum number of passes over the boxes: what one pass drops can change the reading of the rest."""


@dataclass
class Change:
    """One kind of change."""

    what: str
    count: int = 0
    first: str = ""
    """Where it occurred first."""


@dataclass
class Fixed:
    """The written file, and its differences from the original."""

    annotation_file: str
    images: int
    annotations: int
    categories: int
    changes: list[Change] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Everything, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """The written file and its contents, in one line."""
        counts = f"{self.images} images, {self.annotations} annotations, {self.categories} categories"
        return f"{self.annotation_file}: {counts}"

    def table(self) -> Table:
        """The changes, for the terminal."""
        table = Table(title="changes" if self.changes else "no changes needed", box=SIMPLE_HEAD)
        for column in ("change", "count", "first"):
            table.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
        for change in self.changes:
            table.add_row(*map(Text, (change.what, str(change.count), change.first)))
        return table


def fix(report: ValidationReport, out: str | Path, train: bool = True) -> Fixed:
    """Write a copy of an annotation file that has no errors.

    Args:
        report: the report of the file; the images are not read again.
        out: the file to write; the original stays unchanged.
        train: as in `validate`.

    Raises:
        ValueError: as in `read_object`; `out` is the file itself; or an error would remain, for example no objects.
            Then nothing is written.
        FileNotFoundError: no such annotation file.
    """
    refuse_overwriting("--fix", out, [report.annotation_file])
    content = read_object(Path(report.annotation_file))
    cleaner = _Cleaner(content, report.files)
    cleaner.clean()
    with atomic_file(out) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")
        result = ValidationReport(report.annotation_file, report.image_dir, files=cleaner.renamed_files())
        judge(scan(partial), train, result)
        remaining = next((finding for finding in result.findings if finding.severity == "error"), None)
        if remaining:
            raise ValueError(
                f"Annotation file {out} is not written, because an error would remain: {remaining.kind} "
                f"({remaining.examples[0]}). {remaining.message}"
            )
    counts = (len(content.get(section, ())) for section in ("images", "annotations", "categories"))
    return Fixed(str(out), *counts, list(cleaner.changes.values()))


class _Cleaner:
    """Repairs the content of an annotation file in place, and counts the changes."""

    def __init__(self, content: dict, files: Files) -> None:
        self.content, self.files = content, files
        self.changes: dict[str, Change] = {}

    def clean(self) -> None:
        self._drop_malformed()
        self._make_ids_unique()
        self._drop_unknown()
        self._drop_images()
        self._complete_images()
        self._merge_images()
        for _ in range(_PASSES):
            before = self._total()
            self._drop_images()
            self._convert_boxes()
            self._drop_empty_boxes()
            self._clip_boxes()
            self._drop_identical()
            if self._total() == before:
                break
        self._fill_optional()

    def renamed_files(self) -> Files:
        """The inspections of the images, by their current names."""
        inspections = ((item.real_name or name, item) for name, item in self.files.odd.items())
        return Files({name: replace(item, name=name, real_name="") for name, item in inspections})

    def _total(self) -> int:
        return sum(change.count for change in self.changes.values())

    def _note(self, what: str, place: str) -> None:
        change = self.changes.setdefault(what, Change(what, first=place))
        change.count += 1

    def _entries(self, section: str) -> list[dict]:
        return self.content.get(section, [])

    def _drop(self, section: str, what: str, fault: Callable[[dict], str | None]) -> None:
        """Drop the entries for which `fault` returns a text, which the list of changes shows."""
        kept = []
        for entry in self._entries(section):
            place = fault(entry)
            if place is None:
                kept.append(entry)
            else:
                self._note(what, place)
        if section in self.content:
            self.content[section] = kept

    def _drop_malformed(self) -> None:
        for section in SECTIONS:
            if section in self.content and not isinstance(self.content[section], list):
                self._note(f"{section} dropped: not a list", str(self.content[section])[:60])
                self.content[section] = []
            kept = []
            for position, entry in enumerate(self._entries(section)):
                fault = entry_fault(section, entry)
                if fault is None:
                    kept.append(entry)
                else:
                    self._note(f"malformed {section} dropped", f"{section}[{position}]: {fault}")
            if section in self.content:
                self.content[section] = kept

    def _make_ids_unique(self) -> None:
        for section in ("images", "categories"):
            last = {entry["id"]: position for position, entry in enumerate(self._entries(section))}
            positions = count()
            self._drop(
                section,
                f"{section} dropped: a later entry has the same id",
                lambda entry, last=last, at=positions: None if last[entry["id"]] == next(at) else f"id {entry['id']}",
            )
        used = {annotation["id"] for annotation in self._entries("annotations")}
        free = (key for key in count(1) if key not in used)
        seen = set()
        for annotation in self._entries("annotations"):
            if annotation["id"] in seen:
                place, annotation["id"] = _place(annotation), next(free)
                self._note("annotations renumbered: their id was taken", f"{place}: {annotation['id']}")
            seen.add(annotation["id"])

    def _drop_unknown(self) -> None:
        for section, name in (("images", "image"), ("categories", "category")):
            known = {entry["id"] for entry in self._entries(section)}
            self._drop(
                "annotations",
                f"annotations dropped: unknown {name}",
                lambda a, known=known, name=name: (
                    None if a[f"{name}_id"] in known else f"{_place(a)}: {name} {a[f'{name}_id']}"
                ),
            )

    def _drop_images(self) -> None:
        """Drop unusable images with their annotations; whether an image is usable as stored depends on its boxes."""
        if not self.files.odd:
            return
        boxes_of: dict[int, list] = {}
        for annotation in self._entries("annotations"):
            boxes_of.setdefault(annotation["image_id"], []).append(annotation["bbox"])
        dropped: set[int] = set()
        for image in self._entries("images"):
            inspection = self.files.odd.get(image["file_name"])
            if inspection is None:
                continue
            boxes = np.array(boxes_of.get(image["id"], []), np.float64).reshape(-1, 4)
            for kind, text in file_findings(inspection, _size(image), boxes):
                if is_unusable(kind):
                    self._note(f"images dropped: {kind}", text)
                    dropped.add(image["id"])
        self._forget(dropped)

    def _forget(self, dropped: Collection[int]) -> None:
        if dropped:
            self.content["images"] = [image for image in self._entries("images") if image["id"] not in dropped]
            self._drop(
                "annotations",
                "annotations dropped: their image is dropped",
                lambda annotation: _place(annotation) if annotation["image_id"] in dropped else None,
            )

    def _complete_images(self) -> None:
        """Fill in the sizes and names of the files."""
        for image in self._entries("images"):
            inspection = self.files.odd.get(image["file_name"])
            if inspection is None:
                continue
            if 0 in _size(image):
                image["height"], image["width"] = inspection.sizes.upright
                self._note("sizes read from the image", f"{image['file_name']}: {image['height']}×{image['width']}")
            if inspection.real_name:
                self._note("names replaced by those on disk", f"{image['file_name']}: {inspection.real_name}")
                image["file_name"] = inspection.real_name
        # From here on, images are looked up by their new names.
        self.files = self.renamed_files()

    def _merge_images(self) -> None:
        """Merge images of the same file into the first of them."""
        first: dict[str, dict] = {}
        merged: dict[int, int] = {}
        dropped: set[int] = set()
        for image in self._entries("images"):
            original = first.setdefault(str(Path(image["file_name"])), image)
            if original is image:
                continue
            place = f"{image['file_name']}: id {image['id']} is now {original['id']}"
            if _size(original) == _size(image):
                merged[image["id"]] = original["id"]
                self._note("images of the same file merged", place)
            else:
                dropped.add(image["id"])
                self._note("images dropped: their file has another entry with another size", place)
        for annotation in self._entries("annotations"):
            annotation["image_id"] = merged.get(annotation["image_id"], annotation["image_id"])
        self.content["images"] = [image for image in self._entries("images") if image["id"] not in merged]
        self._forget(dropped)

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, 4] and the sizes of their images [N, 2]."""
        sizes = {image["id"]: _size(image) for image in self._entries("images")}
        annotations = self._entries("annotations")
        boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4)
        return boxes, np.array([sizes[a["image_id"]] for a in annotations], np.int64).reshape(-1, 2)

    def _convert_boxes(self) -> None:
        """Convert fractions and corners if the whole file has them."""
        boxes, sizes = self._arrays()
        for reading in box_readings(boxes, sizes):
            if not reading.is_whole:
                continue
            what = "boxes converted from fractions" if reading.kind == "fractions" else "boxes converted from corners"
            for at, pixels in zip(reading.positions.tolist(), reading.pixels.tolist(), strict=True):
                annotation = self._entries("annotations")[at]
                # Six digits, without the rounding noise of the multiplication.
                self._replace_box(annotation, [round(value, 6) for value in pixels], f"{what} ({reading.numbers})")
                area = annotation.get("area")
                if reading.kind == "fractions" and area is not None and 0 < area <= 1:
                    annotation["area"] = area * int(sizes[at].prod())

    def _replace_box(self, annotation: dict, box: list, what: str) -> None:
        """Replace a box; the area changes with it if it was the box's area."""
        old, area = annotation["bbox"], annotation.get("area")
        self._note(what, f"{_place(annotation)}: {old} to {box}")
        annotation["bbox"] = box
        product = old[2] * old[3]
        if area is not None and abs(area - product) <= 1e-6 * abs(product):
            annotation["area"] = box[2] * box[3]

    def _drop_empty_boxes(self) -> None:
        boxes, sizes = self._arrays()
        is_inside = (boxes[:, 2:] > 0) & (boxes[:, :2] < sizes[:, ::-1]) & (boxes[:, :2] + boxes[:, 2:] > 0)
        kept = iter(is_inside.all(1).tolist())
        self._drop(
            "annotations",
            "boxes dropped: no area in their image",
            lambda annotation: None if next(kept) else f"{_place(annotation)}: {annotation['bbox']}",
        )

    def _clip_boxes(self) -> None:
        boxes, sizes = self._arrays()
        for at in np.flatnonzero(reaches_out(boxes, sizes)).tolist():
            annotation = self._entries("annotations")[at]
            x, y, width, height = annotation["bbox"]
            rows, columns = sizes[at].tolist()
            left, upper = max(x, 0), max(y, 0)
            box = [left, upper, min(x + width, columns) - left, min(y + height, rows) - upper]
            self._replace_box(annotation, box, "boxes clipped to their image")

    def _drop_identical(self) -> None:
        seen: set[tuple] = set()

        def fault(annotation: dict) -> str | None:
            crowd = bool(annotation.get("iscrowd"))
            key = (annotation["image_id"], annotation["category_id"], crowd, *annotation["bbox"])
            is_new = key not in seen
            seen.add(key)
            return None if is_new else _place(annotation)

        self._drop("annotations", "identical annotations dropped", fault)

    def _fill_optional(self) -> None:
        for annotation in self._entries("annotations"):
            defaults = {"area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": 0}
            for name, value in defaults.items():
                if annotation.get(name) is None:
                    annotation[name] = value
                    self._note(f"{name} filled in", f"{_place(annotation)}: {value}")


def _place(annotation: dict[str, Any]) -> str:
    return f"annotation {annotation['id']}, image {annotation['image_id']}"


def _size(image: dict[str, Any]) -> tuple[int, int]:
    """Height and width; 0, 0 if one of them is unknown."""
    sides = image.get("height"), image.get("width")
    return (0, 0) if any(side is None or side <= 0 for side in sides) else sides
