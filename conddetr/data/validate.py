"""Checks a whole data set before hours of training: its errors, its oddities, and where they occur.

Errors would stop or spoil a training run; warnings are hints for the user.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from conddetr.config.checks import check_least
from conddetr.data.annotations import SECTIONS, Annotations, Scan, scan
from conddetr.data.boxes import BoxReading, box_readings, reaches_out, stored_fault
from conddetr.data.images import ImageSizes, ImageTooLargeError, PixelError, image_sizes, read_image
from conddetr.data.names import find_image
from conddetr.processes import can_start_workers, cores, ignore_interrupts, interrupts_held

MIN_IMAGES_FROM_SCRATCH = 10_000
"""With fewer images, detection transformers trained from random weights stay far below pretrained ones: they learn from
data alone what convolutions or anchors have built in. The paper trains on 118,287 images."""
MIN_OBJECTS_PER_CLASS = 50
BALANCE = 100.0
"""Ratio of objects between the largest and the smallest class above which a warning is given."""
_EXAMPLES = 5
_SHOWN_CLASSES = 12


@dataclass
class Finding:
    """One kind of problem."""

    severity: str
    """`error` or `warning`."""
    kind: str
    message: str
    """Its meaning, and how to fix it."""
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first few places."""


@dataclass(slots=True)
class Inspection:
    """The result of reading one image file."""

    name: str
    """As in the annotations."""
    fault: tuple[str, str] | None = None
    """Why it is unusable: kind and description."""
    digest: str = ""
    """Hash of its bytes."""
    sizes: ImageSizes | None = None
    real_name: str = ""
    """As on disk, relative to the folder."""


@dataclass
class Files:
    """The results of reading the image files."""

    odd: dict[str, Inspection] = field(default_factory=dict)
    """By name in the annotations, all files that are not plain images of the annotated size."""
    names_of: dict[str, list[str]] = field(default_factory=dict)
    """Names on disk by the digest of their bytes."""


@dataclass
class ValidationReport:
    """The results of validating one data set."""

    annotation_file: str
    image_dir: str
    images: int = 0
    boxes: int = 0
    crowds: int = 0
    classes: list[dict] = field(default_factory=list)
    """`id`, `name` and `boxes` of each category, without crowds."""
    findings: list[Finding] = field(default_factory=list)
    files: Files = field(default_factory=Files, repr=False)
    """Not part of the written report."""

    @property
    def ok(self) -> bool:
        """Whether there are no errors; warnings are allowed."""
        return all(finding.severity != "error" for finding in self.findings)

    def add(self, severity: str, kind: str, message: str, places: Iterable[str]) -> None:
        """Add a kind of problem, if it occurs anywhere."""
        places = list(places)
        if places:
            self.findings.append(Finding(severity, kind, message, len(places), places[:_EXAMPLES]))

    def add_at(
        self, severity: str, kind: str, message: str, positions: np.ndarray, describe: Callable[[int], str]
    ) -> None:
        """As `add`, for positions [n] in an array; only the first few are described."""
        if len(positions):
            examples = [describe(position) for position in positions[:_EXAMPLES].tolist()]
            self.findings.append(Finding(severity, kind, message, len(positions), examples))

    def to_dict(self) -> dict:
        """Everything, for JSON."""
        content = {"ok": self.ok, **asdict(replace(self, files=Files()))}
        del content["files"]
        return content

    def summary(self) -> str:
        """The data set in one line."""
        counts = f"{self.images} images, {self.boxes} boxes, {self.crowds} crowds, {len(self.classes)} classes"
        return f"{self.annotation_file}: {counts}"

    def tables(self) -> list[Table]:
        """The largest classes, and all findings, for the terminal."""
        classes = Table(box=SIMPLE_HEAD)
        classes.add_column("class")
        classes.add_column("boxes", justify="right")
        labels = self.labels()
        ordered = sorted(zip(labels, self.classes, strict=True), key=lambda item: -item[1]["boxes"])
        for label, category in ordered[:_SHOWN_CLASSES]:
            classes.add_row(Text(label), str(category["boxes"]))
        if ordered[_SHOWN_CLASSES:]:
            rest = [category["boxes"] for _, category in ordered[_SHOWN_CLASSES:]]
            classes.add_row(f"{len(rest)} more, at most {rest[0]} each", str(sum(rest)))
        findings = Table(title="findings" if self.findings else "no problems", box=SIMPLE_HEAD)
        for column in ("", "problem", "count", "meaning", "first occurrences"):
            findings.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
        for entry in sorted(self.findings, key=lambda finding: finding.severity):
            severity = Text(entry.severity, style="red" if entry.severity == "error" else "yellow")
            # As text, because brackets in names would be read as markup.
            row = (entry.kind, str(entry.count), entry.message, "\n".join(entry.examples))
            findings.add_row(severity, *map(Text, row))
        return [classes, findings]

    def labels(self) -> list[str]:
        """Names of the classes, with their ids if names repeat."""
        uses = Counter(category["name"] for category in self.classes)
        return [
            f"{category['name']} (id {category['id']})" if uses[category["name"]] > 1 else category["name"]
            for category in self.classes
        ]


def validate(
    image_dir: str | Path,
    annotation_file: str | Path | Annotations | Scan,
    train: bool = True,
    processes: int | None = None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> ValidationReport:
    """Check an annotation file and every image that it names.

    Args:
        image_dir: folder of the images.
        annotation_file: JSON in COCO's format, or annotations from any source.
        train: whether the data set is for training, which needs enough objects of each class.
        processes: number of processes that read images; default: one per core.
        on_image: called with the number of images just done and the total, for progress.

    Returns:
        The report; problems of the data never raise an error.

    Raises:
        ValueError: `processes` below 1.
    """
    if processes is not None:
        check_least("processes", processes, 1)
    if isinstance(annotation_file, Annotations):
        annotation_file = Scan(annotation_file)
    if isinstance(annotation_file, Scan):
        content, source = annotation_file, annotation_file.annotations.source
    else:
        content, source = None, str(annotation_file)
    report = ValidationReport(source, str(image_dir))
    content = content or _scanned(Path(annotation_file), report)
    if content is not None:
        report.files = _read_files(content.annotations, Path(image_dir), processes, on_image)
        judge(content, train, report)
    return report


def judge(content: Scan, train: bool, report: ValidationReport) -> None:
    """Add all problems of annotations, after their images have been read, to the report."""
    data = _completed(content.annotations, report.files)
    report.images = len(data)
    _check_entries(content, train, report)
    _check_categories(data, report)
    _count_objects(data, report)
    _check_boxes(data, report)
    if train:
        _check_amounts(report)
    _check_files(data, content.annotations.sizes, report)


def _scanned(path: Path, report: ValidationReport) -> Scan | None:
    try:
        return scan(path)
    except FileNotFoundError:
        report.add("error", "missing annotation file", "The file does not exist: check its path.", [str(path)])
    except (ValueError, OSError) as error:
        message = f"It cannot be read as COCO's JSON: {error} Export it again."
        report.add("error", "unreadable annotation file", message, [str(path)])
    return None


def _completed(data: Annotations, files: Files) -> Annotations:
    """The annotations with missing sizes filled in from the images."""
    sizes = data.sizes.copy()
    for position in np.flatnonzero((sizes == 0).any(1)).tolist():
        inspection = files.odd.get(data.names[position])
        if inspection and inspection.sizes:
            sizes[position] = inspection.sizes.upright
    return replace(data, sizes=sizes)


def _check_entries(content: Scan, train: bool, report: ValidationReport) -> None:
    """Entries that do not follow the format, and references to unknown ids."""
    report.add("error", "missing section", "The file needs this list: export it again.", content.missing)
    for section in SECTIONS:
        message = "These entries do not follow COCO's format: correct them; --fix drops them."
        report.add("error", f"malformed {section}", message, content.malformed.get(section, ()))
        message = "Ids must be unique; " + (
            "give each entry its own, as --fix does."
            if section == "annotations"
            else "all but the last entry of each id are lost, and --fix drops them: give each its own."
        )
        repeated = (f"id {key}" for key in content.repeated.get(section, ()))
        report.add("error", f"duplicate ids in {section}", message, repeated)
    message = "The category is not in the list of categories: add it there; --fix drops the annotation."
    report.add("error", "unknown category", message, content.unknown_category)
    message = "The image is not in the list of images: add it there; --fix drops the annotation."
    report.add("error", "unknown image", message, content.unknown_image)
    if not content.annotations.is_annotated and "annotations" not in content.missing:
        message = "The file has no list of annotations, like a test set's: detections can be written, but nothing "
        message += "can be measured. " + ("To train, use the file with annotations." if train else "")
        report.add("error" if train else "warning", "no annotations", message.strip(), [report.annotation_file])


def _check_categories(data: Annotations, report: ValidationReport) -> None:
    if not data.categories:
        message = "There is nothing to detect: add the list of categories."
        report.add("error", "no categories", message, [report.annotation_file])
    repeated = _repeated(category["name"] for category in data.categories)
    message = "They stay separate classes, which differ only in their ids: give each its own name, or merge them."
    report.add("warning", "duplicate class names", message, repeated)


def _repeated(values: Iterable) -> list:
    return [value for value, count in Counter(values).items() if count > 1]


def _count_objects(data: Annotations, report: ValidationReport) -> None:
    objects = ~data.crowds
    report.boxes, report.crowds = int(objects.sum()), int(data.crowds.sum())
    counts = np.bincount(data.category_of[objects], minlength=len(data.categories)).tolist()
    report.classes = [{**category, "boxes": count} for category, count in zip(data.categories, counts, strict=True)]
    if not len(data):
        message = "The list of images is empty, or none of its entries can be read: export it again."
        report.add("error", "no images", message, [report.annotation_file])
    if not data.is_annotated or not len(data):
        return
    empty = np.flatnonzero(np.bincount(data.image_of[objects], minlength=len(data)) == 0)
    message = "They teach the background; too many slow learning. Check that their annotations were not lost."
    report.add_at("warning", "images without objects", message, empty, lambda at: f"image {data.image_ids[at]}")
    if not report.boxes and report.crowds:
        message = "Training ignores crowds (iscrowd 1), so nothing is left to learn or to measure. Some tools export "
        message += "every mask as a crowd: export polygons or boxes, or set iscrowd to 0 if a box is one object."
        report.add("error", "only crowds", message, [f"{report.crowds} boxes, all crowds"])
    elif not report.boxes:
        message = "There is nothing to learn from or to measure: check that the export includes annotations."
        report.add("error", "no objects", message, [report.annotation_file])


def _check_boxes(data: Annotations, report: ValidationReport) -> None:
    sizes = data.sizes[data.image_of]
    readings = box_readings(data.boxes, sizes)
    for reading in readings:
        _add_reading(reading, data, report)
    wide, is_known = (data.boxes[:, 2:] > 0).all(1), (sizes > 0).all(1)
    in_image = (data.boxes[:, :2] < sizes[:, ::-1]).all(1) & (data.boxes[:, :2] + data.boxes[:, 2:] > 0).all(1)
    is_out = reaches_out(data.boxes, sizes) & in_image
    for reading in readings:
        if reading.is_whole:
            # Already reported above.
            is_out[reading.positions] = False
    hint = "If there are many, check that boxes are x, y, width, height in pixels of this image, upright."
    for severity, kind, message, which in (
        ("warning", "box without area", "Width or height is not positive. Training and --fix leave it out.", ~wide),
        ("error", "box outside its image", f"No part is inside; --fix drops it. {hint}", wide & is_known & ~in_image),
        ("warning", "box reaching out of its image", f"Training and --fix clip it. {hint}", wide & is_known & is_out),
    ):
        report.add_at(severity, kind, message, np.flatnonzero(which), lambda at: _box_place(data, at))
    message = "The same image, class and box occur more than once: each counts as an object. --fix keeps one."
    report.add_at("warning", "identical annotations", message, _identical(data), lambda at: _place(data, at))
    if not readings:
        _check_corner(data, sizes, is_known & wide, report)


def _add_reading(reading: BoxReading, data: Annotations, report: ValidationReport) -> None:
    if reading.kind == "fractions":
        kind = "boxes in fractions of the image"
        message = f"Boxes must be in pixels; these are smaller than one. They look like {reading.numbers} as fractions."
        todo = "Multiply by width and height"
    else:
        kind = "boxes are corners"
        message = "Boxes must be x, y, width, height. Read so, they exceed their images; as two corners they fit."
        todo = "Subtract the first corner from the second"
    if reading.is_whole:
        message += f" {todo}, as --fix does."
    else:
        message += f" Other boxes are correct: were two sources merged? {todo} for the wrong ones."
    pixels = dict(zip(reading.positions[:_EXAMPLES].tolist(), reading.pixels[:_EXAMPLES], strict=True))
    severity = "error" if reading.is_whole else "warning"

    def describe(at: int) -> str:
        as_integers = bool((data.boxes[at] % 1 == 0).all())
        return f"{_box_place(data, at)} would be {_shown(pixels[at], as_integers)}"

    report.add_at(severity, kind, message, reading.positions, describe)


def _check_corner(data: Annotations, sizes: np.ndarray, which: np.ndarray, report: ValidationReport) -> None:
    """Warn if all boxes lie in one corner, as boxes of a smaller copy of the images do."""
    if which.sum() < MIN_OBJECTS_PER_CLASS:
        return
    width, height = ((data.boxes[:, :2] + data.boxes[:, 2:]) / sizes.clip(1)[:, ::-1])[which].max(0)
    if max(width, height) < 0.5:
        message = "No box reaches beyond the upper left quarter of its image: are they in pixels of a smaller copy?"
        text = f"they end at {width:.0%} of the width and {height:.0%} of the height"
        report.add("warning", "boxes in one corner", f"{message} Scale them to the images.", [text])


def _place(data: Annotations, at: int) -> str:
    return f"annotation {data.ids[at]}, image {data.image_ids[data.image_of[at]]}"


def _box_place(data: Annotations, at: int) -> str:
    height, width = data.sizes[data.image_of[at]].tolist()
    box = _shown(data.boxes[at], bool((data.boxes[at] % 1 == 0).all()))
    return f"{_place(data, at)}: {box}" + (f" in {height}×{width}" if height else "")


def _shown(box: np.ndarray, as_integers: bool) -> list[float]:
    """The numbers of a box without rounding noise."""
    return [round(value) if as_integers else float(f"{value:.6g}") for value in box.tolist()]


def _identical(data: Annotations) -> np.ndarray:
    """Positions [n] of the second of each group of identical annotations."""
    columns = (*data.boxes.T, data.crowds, data.category_of, data.image_of)
    order = np.lexsort(columns)
    is_same = np.arange(len(order)) > 0
    for column in columns:
        values = column[order]
        is_same[1:] &= values[1:] == values[:-1]
    is_second = is_same.copy()
    is_second[1:] &= ~is_same[:-1]
    return np.sort(order[is_second])


def _check_amounts(report: ValidationReport) -> None:
    """Check that there are enough images, and enough objects of each class, for training."""
    counts = dict(enumerate(category["boxes"] for category in report.classes))
    labels = report.labels()
    empty = [labels[position] for position, count in counts.items() if count == 0]
    message = "The class cannot be learned: add objects, or remove the category."
    report.add("warning", "class without objects", message, empty)
    rare = [f"{labels[position]}: {count}" for position, count in counts.items() if 0 < count < MIN_OBJECTS_PER_CLASS]
    message = f"Fewer than {MIN_OBJECTS_PER_CLASS} objects: expect a low AP, or add some."
    report.add("warning", "rare class", message, rare)
    present = [count for count in counts.values() if count]
    if present and max(present) > BALANCE * min(present):
        message = f"The largest class has more than {BALANCE:.0f} times the objects of the smallest: check the AP of "
        message += "each class (eval --per-class), and add objects of the small ones."
        report.add("warning", "unbalanced classes", message, [f"{max(present)} and {min(present)} objects"])
    if report.images < MIN_IMAGES_FROM_SCRATCH:
        message = (
            f"Fewer than {MIN_IMAGES_FROM_SCRATCH:,} images: a detection transformer learns from data alone what other "
            "detectors have built in. Start from a trained detector's weights, not only from a pretrained backbone."
        )
        report.add("warning", "too small to train from scratch", message, [f"{report.images} images"])


def compare_splits(train: ValidationReport, val: ValidationReport) -> None:
    """Add conflicts with the training set to the validation set's report."""
    note_shared_images(train, val)
    note_other_categories(train, val)


def note_shared_images(train: ValidationReport, val: ValidationReport) -> None:
    """Add a warning to the validation set's report for images that are also in the training set, byte for byte."""
    known = train.files.names_of
    shared = [f"{names[0]} = {known[digest][0]}" for digest, names in val.files.names_of.items() if digest in known]
    message = "Results on them say nothing about new images: remove them from one of the sets."
    val.add("warning", "images of the training set", message, shared)


def note_other_categories(train: ValidationReport, val: ValidationReport) -> None:
    """Add errors to the validation set's report for categories that differ from the training set's."""
    if not train.classes:
        # Another check reports this error.
        return
    known = {category["id"]: category["name"] for category in train.classes}
    unlike = [category for category in val.classes if known.get(category["id"]) != category["name"]]
    clashing = [
        f"id {category['id']}: {category['name']!r} here, {known[category['id']]!r} in the training set"
        for category in unlike
        if category["id"] in known
    ]
    message = "One class would be measured as another: use the same category ids in both files."
    val.add("error", "category with another name", message, clashing)
    missing = [f"id {category['id']}: {category['name']!r}" for category in unlike if category["id"] not in known]
    message = "The detector cannot learn it: add it to the training set, or remove it here."
    val.add("error", "category not in the training set", message, missing)


_FILE_FINDINGS = {
    "missing file": ("error", "The image is not in the folder: add it, or remove its entry, as --fix does."),
    "ambiguous file name": (
        "error",
        "Several files differ from it only in case: write the exact name. --fix drops the entry.",
    ),
    "image too large": (
        "error",
        "It has more pixels than Pillow's limit. If you trust it, raise the limit with the environment variable "
        "CONDDETR_MAX_PIXELS, also for training; else make it smaller. --fix drops the entry.",
    ),
    "pixels that are not colours": (
        "error",
        "The file is readable, but its values are not colours: scale them and save it again. --fix drops the entry.",
    ),
    "damaged file": (
        "error",
        "Truncated, corrupt or not an image: replace it, or remove its entry, as --fix does.",
    ),
    "size mismatch": (
        "error",
        "Boxes would be misplaced: the size of the file differs from the annotations. Replace the file with the right "
        "one, or correct size and boxes. --fix drops the entry.",
    ),
    "orientation not clear": (
        "error",
        "The annotations give the size before the EXIF tag turns the image. Write the upright size if boxes refer to "
        "the upright image, else save the image without the tag. --fix drops the entry.",
    ),
    "annotated as stored": (
        "warning",
        "Size and boxes fit the image only as stored, before its EXIF tag turns it: it is used as stored. Check one "
        "image. Images saved without the tag are unambiguous.",
    ),
    "orientation tag": (
        "warning",
        "A tag turns the image. Boxes refer to the upright image, as labelling tools show it. Check one image.",
    ),
    "size not given": ("warning", "Height and width are read from the image; --fix fills them in."),
    "name spelled differently": (
        "warning",
        "The file exists under another spelling and is used. Other tools and systems may not find it: write the exact "
        "name, as --fix does.",
    ),
}
"""Severity and message of each kind of finding in an image file."""


def _check_files(data: Annotations, annotated: np.ndarray, report: ValidationReport) -> None:
    """Add findings about image files; `annotated` [I, 2]: height and width in the annotations, 0 if unknown."""
    names = list(data.names)
    odd, offsets = report.files.odd, data.offsets
    # As paths: ./1.jpg is 1.jpg.
    real_names = [str(Path(odd[name].real_name or name if name in odd else name)) for name in names]
    message = "Two image ids name the same file: give all its annotations one id, as --fix does."
    report.add("error", "duplicate file names", message, _repeated(real_names))
    places: dict[str, list[str]] = defaultdict(list)
    for position, name in enumerate(names):
        if name in odd:
            boxes = data.boxes[offsets[position] : offsets[position + 1]]
            for kind, text in file_findings(odd[name], tuple(annotated[position].tolist()), boxes):
                places[kind].append(text)
    for kind, (severity, message) in _FILE_FINDINGS.items():
        report.add(severity, kind, message, places[kind])
    groups = [" = ".join(names) for names in report.files.names_of.values() if len(names) > 1]
    message = "The same bytes have several names: annotations may differ, and splits may share the image. Keep one."
    report.add("warning", "identical images", message, groups)


def file_findings(inspection: Inspection, annotated: tuple[int, int], boxes: np.ndarray) -> Iterator[tuple[str, str]]:
    """Findings about one image: kind and text.

    Args:
        inspection: the result of reading its file.
        annotated: height and width in the annotations; 0, 0 if unknown.
        boxes: [n, 4] xywh in pixels.
    """
    name, sizes = inspection.name, inspection.sizes
    if inspection.real_name not in ("", name):
        yield "name spelled differently", f"{name} is {inspection.real_name}"
    if inspection.fault:
        yield inspection.fault
        return
    if sizes.orientation not in (None, 1):
        yield "orientation tag", f"{name}: tag {sizes.orientation}"
    if 0 in annotated:
        yield "size not given", name
    elif annotated != sizes.upright:
        turned = " upright" if sizes.stored != sizes.upright else ""
        text = f"{name}: the annotations give height × width {annotated[0]}×{annotated[1]}, but the{turned} image has "
        text += "{}×{}".format(*sizes.upright)
        fault = stored_fault(boxes, annotated, sizes.upright, sizes.stored)
        if fault is None:
            yield "annotated as stored", text
        elif annotated == sizes.stored:
            yield "orientation not clear", f"{text}. {fault}"
        else:
            yield "size mismatch", text


def is_unusable(kind: str) -> bool:
    """Whether an image with this kind of finding is unusable."""
    return _FILE_FINDINGS[kind][0] == "error"


def _read_files(
    data: Annotations, image_dir: Path, processes: int | None, on_image: Callable[[int, int], None]
) -> Files:
    """Read every image completely."""
    files = Files(names_of=defaultdict(list))
    for annotated, inspection in zip(data.sizes, _inspect_all(list(data.names), image_dir, processes), strict=True):
        sizes, real_name = inspection.sizes, inspection.real_name or inspection.name
        if inspection.digest and real_name not in files.names_of[inspection.digest]:
            files.names_of[inspection.digest].append(real_name)
        is_tagged = sizes is not None and sizes.orientation not in (None, 1)
        is_plain = not inspection.fault and not is_tagged and real_name == inspection.name
        if not is_plain or sizes.upright != tuple(annotated.tolist()):
            files.odd[inspection.name] = inspection
        on_image(1, len(data))
    return files


def _inspect_all(names: list[str], image_dir: Path, processes: int | None) -> Iterator[Inspection]:
    processes = min(processes or cores(), max(1, len(names) // 16))
    tasks = [(image_dir, name) for name in names]
    if processes <= 1 or not can_start_workers():
        yield from map(_inspect, tasks)
        return
    with ProcessPoolExecutor(processes, initializer=ignore_interrupts) as pool:
        try:
            with interrupts_held():
                inspections = pool.map(_inspect, tasks, chunksize=16)
            yield from inspections
        except BrokenProcessPool as error:
            raise OSError(
                f"A process that read images of {image_dir} was killed, likely for lack of memory: use one process."
            ) from error


def _inspect(task: tuple[Path, str]) -> Inspection:
    """Read one image, in a worker process."""
    image_dir, name = task
    inspection = Inspection(name)
    try:
        path = find_image(image_dir, name)
    except FileNotFoundError as error:
        # Only the name, if the error adds nothing to it.
        is_plain = str(error) == f"Image file {image_dir / name} does not exist."
        return replace(inspection, fault=("missing file", name if is_plain else str(error)))
    except ValueError as error:
        return replace(inspection, fault=("ambiguous file name", str(error)))
    # No permission, or a name that is too long for the system.
    except OSError as error:
        return replace(inspection, fault=("missing file", f"{name}: {error}"))
    if path != image_dir / name:
        inspection.real_name = (path.relative_to(image_dir) if path.is_relative_to(image_dir) else path).as_posix()
    try:
        inspection.sizes = image_sizes(path)
        read_image(path)
        inspection.digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except ImageTooLargeError as error:
        inspection.fault = ("image too large", str(error))
    except PixelError as error:
        inspection.fault = ("pixels that are not colours", str(error))
    # OSError: no permission. OverflowError, MemoryError: sizes that no image has.
    except (ValueError, OSError, MemoryError, OverflowError) as error:
        inspection.fault = ("damaged file", str(error))
    return inspection
