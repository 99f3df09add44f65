"""A data set read from end to end before hours are spent on it: what is wrong, what is odd, and where.

Errors would stop or spoil a training run; warnings tell what a person should know.
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
from conddetr.data.boxes import BoxReading, box_readings, reaches_out
from conddetr.data.coco import stored_fault
from conddetr.data.images import ImageSizes, ImageTooLargeError, PixelError, image_sizes, read_image
from conddetr.data.names import find_image
from conddetr.processes import can_start_workers, cores, ignore_interrupts, interrupts_held

MIN_IMAGES_FROM_SCRATCH = 10_000
"""Below this, detection transformers trained from random weights stay far under what pretrained ones reach: they learn
from data alone what convolutions or anchors have built in. The paper trains on 118,287 images."""
MIN_OBJECTS_PER_CLASS = 50
BALANCE = 100.0
"""How many times more objects the largest class may have than the smallest before it is said."""
_EXAMPLES = 5
_SHOWN_CLASSES = 12


@dataclass
class Finding:
    """One kind of problem."""

    severity: str
    """`error` or `warning`."""
    kind: str
    message: str
    """What it means and what to do."""
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first few places."""


@dataclass(slots=True)
class Inspection:
    """What was found in one image file."""

    name: str
    """As in the annotations."""
    fault: tuple[str, str] | None = None
    """Why it cannot be used: kind and description."""
    digest: str = ""
    """Of its bytes."""
    sizes: ImageSizes | None = None
    real_name: str = ""
    """As on the disk, relative to the folder."""


@dataclass
class Files:
    """What was found in the files of the images."""

    odd: dict[str, Inspection] = field(default_factory=dict)
    """By name in the annotations, what is not as a plain image of the size that the annotations say."""
    names_of: dict[str, list[str]] = field(default_factory=dict)
    """Names on the disk by the digest of their bytes."""


@dataclass
class ValidationReport:
    """What was found in one data set."""

    annotation_file: str
    image_dir: str
    images: int = 0
    boxes: int = 0
    crowds: int = 0
    classes: list[dict] = field(default_factory=list)
    """`id`, `name` and `boxes` of each category; crowds are not counted."""
    findings: list[Finding] = field(default_factory=list)
    files: Files = field(default_factory=Files, repr=False)
    """Not part of the written report."""

    @property
    def ok(self) -> bool:
        """No errors; warnings are allowed."""
        return all(finding.severity != "error" for finding in self.findings)

    def add(self, severity: str, kind: str, message: str, places: Iterable[str]) -> None:
        """Note a kind of problem, if there is any place where it occurs."""
        places = list(places)
        if places:
            self.findings.append(Finding(severity, kind, message, len(places), places[:_EXAMPLES]))

    def add_at(
        self, severity: str, kind: str, message: str, positions: np.ndarray, describe: Callable[[int], str]
    ) -> None:
        """As `add`, of positions [n] in an array, of which only the first few are described."""
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
            classes.add_row(f"{len(rest)} more, of at most {rest[0]}", str(sum(rest)))
        findings = Table(title="findings" if self.findings else "nothing wrong found", box=SIMPLE_HEAD)
        for column in ("", "what", "count", "meaning", "first places"):
            findings.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
        for found in sorted(self.findings, key=lambda finding: finding.severity):
            severity = Text(found.severity, style="red" if found.severity == "error" else "yellow")
            # As text: brackets in names would be read as markup.
            row = (found.kind, str(found.count), found.message, "\n".join(found.examples))
            findings.add_row(severity, *map(Text, row))
        return [classes, findings]

    def labels(self) -> list[str]:
        """Names of the classes, with their ids where names repeat."""
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
    """Check an annotation file and every image it names.

    Args:
        image_dir: folder of the images.
        annotation_file: JSON in COCO's format, or what was read from any file.
        train: whether it is to be trained on: then it needs objects, enough of them, and enough of each class.
        processes: that read images; default: one per core.
        on_image: called with the number of images just done and of all, for progress.

    Returns:
        The report; problems of the data never raise.

    Raises:
        ValueError: `processes` below 1.
    """
    if processes is not None:
        check_least("processes", processes, 1)
    if isinstance(annotation_file, Annotations):
        annotation_file = Scan(annotation_file)
    if isinstance(annotation_file, Scan):
        found, source = annotation_file, annotation_file.annotations.source
    else:
        found, source = None, str(annotation_file)
    report = ValidationReport(source, str(image_dir))
    found = found or _scanned(Path(annotation_file), report)
    if found is not None:
        report.files = _read_files(found.annotations, Path(image_dir), processes, on_image)
        judge(found, train, report)
    return report


def judge(found: Scan, train: bool, report: ValidationReport) -> None:
    """Note all that is wrong in annotations whose images have been read."""
    data = _completed(found.annotations, report.files)
    report.images = len(data)
    _check_entries(found, train, report)
    _check_categories(data, report)
    _count_objects(data, report)
    _check_boxes(data, report)
    if train:
        _check_amounts(report)
    _check_files(data, found.annotations.sizes, report)


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
    """With the sizes of the images where the annotations do not say them."""
    sizes = data.sizes.copy()
    for position in np.flatnonzero((sizes == 0).any(1)).tolist():
        inspection = files.odd.get(data.names[position])
        if inspection and inspection.sizes:
            sizes[position] = inspection.sizes.upright
    return replace(data, sizes=sizes)


def _check_entries(found: Scan, train: bool, report: ValidationReport) -> None:
    """What does not follow the format, and what refers to nothing."""
    report.add("error", "missing section", "The file needs this list: export it again.", found.missing)
    for section in SECTIONS:
        message = "Entries that do not follow COCO's format: mend them; --fix drops them."
        report.add("error", f"malformed {section}", message, found.malformed.get(section, ()))
        message = "Ids must be unique; " + (
            "give each its own, as --fix does."
            if section == "annotations"
            else "all but the last of each are lost, and --fix drops them: give each its own."
        )
        repeated = (f"id {key}" for key in found.repeated.get(section, ()))
        report.add("error", f"duplicate ids in {section}", message, repeated)
    message = "The category is not in the list of categories: add it there; --fix drops the annotation."
    report.add("error", "unknown category", message, found.unknown_category)
    message = "The image is not in the list of images: add it there; --fix drops the annotation."
    report.add("error", "unknown image", message, found.unknown_image)
    if not found.annotations.is_annotated and "annotations" not in found.missing:
        message = "The file has no list of annotations, as that of a test set: detections can be written, and nothing "
        message += "can be measured. " + ("To train, take the file with annotations." if train else "")
        report.add("error" if train else "warning", "no annotations", message.strip(), [report.annotation_file])


def _check_categories(data: Annotations, report: ValidationReport) -> None:
    if not data.categories:
        message = "There is nothing to detect: add the list of categories."
        report.add("error", "no categories", message, [report.annotation_file])
    repeated = _repeated(category["name"] for category in data.categories)
    message = "They stay classes of their own, told apart by their ids alone: give each its own name, or merge them."
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
    message = "They teach what is background; too many slow learning. Check that their annotations were not lost."
    report.add_at("warning", "images without objects", message, empty, lambda place: f"image {data.image_ids[place]}")
    if not report.boxes and report.crowds:
        message = "Crowds (iscrowd 1) are not trained on, so nothing is left to learn or to measure. Some tools export "
        message += "every mask as a crowd: export polygons or boxes, or set iscrowd to 0 where one box is one object."
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
            # Said once.
            is_out[reading.positions] = False
    hint = "If there are many, check that boxes are x, y, width, height in pixels of this image, upright."
    for severity, kind, message, which in (
        ("warning", "box without area", "Width or height is not positive. Training leaves it out, --fix too.", ~wide),
        ("error", "box outside its image", f"No part is inside; --fix drops it. {hint}", wide & is_known & ~in_image),
        ("warning", "box reaching out of its image", f"Training clips it, --fix too. {hint}", wide & is_known & is_out),
    ):
        report.add_at(severity, kind, message, np.flatnonzero(which), lambda at: _box_place(data, at))
    message = "Same image, class and box more than once: each counts as an object. --fix keeps one."
    report.add_at("warning", "identical annotations", message, _identical(data), lambda at: _place(data, at))
    if not readings:
        _check_corner(data, sizes, is_known & wide, report)


def _add_reading(reading: BoxReading, data: Annotations, report: ValidationReport) -> None:
    if reading.kind == "fractions":
        kind = "boxes in fractions of the image"
        message = f"Boxes must be in pixels; these are under one. They look like {reading.numbers} as fractions."
        todo = "Multiply by width and height"
    else:
        kind = "boxes are corners"
        message = "Boxes must be x, y, width, height. Read so, they reach out of their images; as two corners they fit."
        todo = "Subtract the first corner from the second"
    if reading.is_whole:
        message += f" {todo}, as --fix does."
    else:
        message += f" Others are as they should be: were two sources merged? {todo} where it is so."
    pixels = dict(zip(reading.positions[:_EXAMPLES].tolist(), reading.pixels[:_EXAMPLES], strict=True))
    severity = "error" if reading.is_whole else "warning"

    def describe(at: int) -> str:
        as_integers = bool((data.boxes[at] % 1 == 0).all())
        return f"{_box_place(data, at)} would be {_shown(pixels[at], as_integers)}"

    report.add_at(severity, kind, message, reading.positions, describe)


def _check_corner(data: Annotations, sizes: np.ndarray, which: np.ndarray, report: ValidationReport) -> None:
    """Boxes of a smaller copy of the images lie in one corner of them."""
    if which.sum() < MIN_OBJECTS_PER_CLASS:
        return
    width, height = ((data.boxes[:, :2] + data.boxes[:, 2:]) / sizes.clip(1)[:, ::-1])[which].max(0)
    if max(width, height) < 0.5:
        message = "No box reaches beyond the left upper quarter of its image: are they in pixels of a smaller copy?"
        text = f"they end at {width:.0%} of the width and {height:.0%} of the height"
        report.add("warning", "boxes in one corner", f"{message} Scale them to the images.", [text])


def _place(data: Annotations, at: int) -> str:
    return f"annotation {data.ids[at]}, image {data.image_ids[data.image_of[at]]}"


def _box_place(data: Annotations, at: int) -> str:
    height, width = data.sizes[data.image_of[at]].tolist()
    box = _shown(data.boxes[at], bool((data.boxes[at] % 1 == 0).all()))
    return f"{_place(data, at)}: {box}" + (f" in {height}×{width}" if height else "")


def _shown(box: np.ndarray, as_integers: bool) -> list[float]:
    """Without the noise of floating numbers."""
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
    """Whether there is enough, and enough of each class, to train on."""
    counts = dict(enumerate(category["boxes"] for category in report.classes))
    labels = report.labels()
    absent = [labels[place] for place, count in counts.items() if count == 0]
    message = "It cannot be learned: add objects, or remove the category."
    report.add("warning", "class without objects", message, absent)
    rare = [f"{labels[place]}: {count}" for place, count in counts.items() if 0 < count < MIN_OBJECTS_PER_CLASS]
    message = f"Fewer than {MIN_OBJECTS_PER_CLASS} objects: expect a low AP, or add some."
    report.add("warning", "rare class", message, rare)
    present = [count for count in counts.values() if count]
    if present and max(present) > BALANCE * min(present):
        message = f"The largest class has more than {BALANCE:.0f} times the objects of the smallest: look at the AP of "
        message += "each class (eval --per-class), and add objects of the small ones."
        report.add("warning", "unbalanced classes", message, [f"{max(present)} and {min(present)} objects"])
    if report.images < MIN_IMAGES_FROM_SCRATCH:
        message = (
            f"Fewer than {MIN_IMAGES_FROM_SCRATCH:,} images: a detection transformer learns from data alone what "
            "others have built in. Start from a trained detector's weights, not only from a pretrained backbone."
        )
        report.add("warning", "too small to train from scratch", message, [f"{report.images} images"])


def compare_splits(train: ValidationReport, val: ValidationReport) -> None:
    """Note in the report of the validation set what does not go with the training set."""
    note_shared_images(train, val)
    note_other_categories(train, val)


def note_shared_images(train: ValidationReport, val: ValidationReport) -> None:
    """Warn in the report of the validation set of images that are in the training set too, byte for byte."""
    known = train.files.names_of
    shared = [f"{names[0]} = {known[digest][0]}" for digest, names in val.files.names_of.items() if digest in known]
    message = "What is measured on them says nothing about new images: remove them from one of the sets."
    val.add("warning", "images of the training set", message, shared)


def note_other_categories(train: ValidationReport, val: ValidationReport) -> None:
    """Note as errors in the report of the validation set categories that the training set does not have so."""
    if not train.classes:
        # That is an error of its own.
        return
    named = {category["id"]: category["name"] for category in train.classes}
    unlike = [category for category in val.classes if named.get(category["id"]) != category["name"]]
    clashing = [
        f"id {category['id']}: {category['name']!r} here, {named[category['id']]!r} in the training set"
        for category in unlike
        if category["id"] in named
    ]
    message = "One class would be measured as another: number the categories alike in both files."
    val.add("error", "category with another name", message, clashing)
    absent = [f"id {category['id']}: {category['name']!r}" for category in unlike if category["id"] not in named]
    message = "The detector cannot know it: add it to the training set, or remove it here."
    val.add("error", "category not in the training set", message, absent)


_FILE_FINDINGS = {
    "missing file": ("error", "The image is not in the folder: put it there, or remove its entry, as --fix does."),
    "ambiguous file name": (
        "error",
        "Several files differ from it in case alone: write the exact name. --fix drops the entry.",
    ),
    "image too large": (
        "error",
        "It has more pixels than Pillow's limit. If you trust it, raise the limit by the environment variable "
        "CONDDETR_MAX_PIXELS, which training needs too; else make it smaller. --fix drops the entry.",
    ),
    "pixels that are no colours": (
        "error",
        "The file can be read, its values have no meaning as an image: scale and save it anew. --fix drops the entry.",
    ),
    "damaged file": (
        "error",
        "Truncated, corrupt or not an image: replace it, or remove its entry, as --fix does.",
    ),
    "size mismatch": (
        "error",
        "Boxes would be off: the file has another size than the annotations say. Put the right file there, or correct "
        "size and boxes. --fix drops the entry.",
    ),
    "orientation not clear": (
        "error",
        "The annotations give the size before the EXIF tag turns the image. Write the upright size if boxes are of the "
        "upright image, else save the image without the tag. --fix drops the entry.",
    ),
    "annotated as stored": (
        "warning",
        "Size and boxes fit the image only as stored, before its EXIF tag turns it: it is used so. Check one; images "
        "saved without the tag leave no doubt.",
    ),
    "orientation tag": (
        "warning",
        "A tag turns the image. Boxes are taken as of the upright image, as labelling tools show it. Check one.",
    ),
    "size not given": ("warning", "Height and width are read from the image; --fix fills them in."),
    "name spelled otherwise": (
        "warning",
        "The file is there under another spelling, and used. Other tools and systems may not find it: write the name "
        "as it is, as --fix does.",
    ),
}
"""Severity and message of what can be found in the file of an image."""


def _check_files(data: Annotations, said: np.ndarray, report: ValidationReport) -> None:
    """What was found in the images; `said` [I, 2]: height and width by the annotations, 0 where they do not say."""
    names = list(data.names)
    odd, offsets = report.files.odd, data.offsets
    # As paths: ./1.jpg is 1.jpg.
    real_names = [str(Path(odd[name].real_name or name if name in odd else name)) for name in names]
    message = "Two image ids name one file: give all its annotations one id, as --fix does."
    report.add("error", "duplicate file names", message, _repeated(real_names))
    places: dict[str, list[str]] = defaultdict(list)
    for position, name in enumerate(names):
        if name in odd:
            boxes = data.boxes[offsets[position] : offsets[position + 1]]
            for kind, text in file_findings(odd[name], tuple(said[position].tolist()), boxes):
                places[kind].append(text)
    for kind, (severity, message) in _FILE_FINDINGS.items():
        report.add(severity, kind, message, places[kind])
    groups = [" = ".join(names) for names in report.files.names_of.values() if len(names) > 1]
    message = "The same bytes under several names: annotations may differ, and splits may share it. Keep one."
    report.add("warning", "identical images", message, groups)


def file_findings(inspection: Inspection, said: tuple[int, int], boxes: np.ndarray) -> Iterator[tuple[str, str]]:
    """What is to be said of one image: kind and text.

    Args:
        inspection: of its file.
        said: height and width by the annotations; 0, 0 where they do not say.
        boxes: [n, 4] xywh in pixels.
    """
    name, sizes = inspection.name, inspection.sizes
    if inspection.real_name not in ("", name):
        yield "name spelled otherwise", f"{name} is {inspection.real_name}"
    if inspection.fault:
        yield inspection.fault
        return
    if sizes.orientation not in (None, 1):
        yield "orientation tag", f"{name}: tag {sizes.orientation}"
    if 0 in said:
        yield "size not given", name
    elif said != sizes.upright:
        turned = ", upright," if sizes.stored != sizes.upright else ""
        text = f"{name}: annotations say height × width {said[0]}×{said[1]}, the file{turned} has "
        text += "{}×{}".format(*sizes.upright)
        fault = stored_fault(boxes, said, sizes.upright, sizes.stored)
        if fault is None:
            yield "annotated as stored", text
        elif said == sizes.stored:
            yield "orientation not clear", f"{text}. {fault}"
        else:
            yield "size mismatch", text


def is_unusable(kind: str) -> bool:
    """Whether an image with such a finding cannot be used."""
    return _FILE_FINDINGS[kind][0] == "error"


def _read_files(
    data: Annotations, image_dir: Path, processes: int | None, on_image: Callable[[int, int], None]
) -> Files:
    """Read every image whole."""
    files = Files(names_of=defaultdict(list))
    for said, inspection in zip(data.sizes, _inspect_all(list(data.names), image_dir, processes), strict=True):
        sizes, real_name = inspection.sizes, inspection.real_name or inspection.name
        if inspection.digest and real_name not in files.names_of[inspection.digest]:
            files.names_of[inspection.digest].append(real_name)
        is_tagged = sizes is not None and sizes.orientation not in (None, 1)
        is_plain = not inspection.fault and not is_tagged and real_name == inspection.name
        if not is_plain or sizes.upright != tuple(said.tolist()):
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
                found = pool.map(_inspect, tasks, chunksize=16)
            yield from found
        except BrokenProcessPool as error:
            raise OSError(
                f"A process that read images of {image_dir} was killed, likely for memory: read them in one process."
            ) from error


def _inspect(task: tuple[Path, str]) -> Inspection:
    """Read one image; in a worker process."""
    image_dir, name = task
    found = Inspection(name)
    try:
        path = find_image(image_dir, name)
    except FileNotFoundError as error:
        # The name alone where there is no more to say.
        is_plain = str(error) == f"Image file {image_dir / name} does not exist."
        return replace(found, fault=("missing file", name if is_plain else str(error)))
    except ValueError as error:
        return replace(found, fault=("ambiguous file name", str(error)))
    # No permission, or a name longer than the system allows.
    except OSError as error:
        return replace(found, fault=("missing file", f"{name}: {error}"))
    if path != image_dir / name:
        found.real_name = (path.relative_to(image_dir) if path.is_relative_to(image_dir) else path).as_posix()
    try:
        found.sizes = image_sizes(path)
        read_image(path)
        found.digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except ImageTooLargeError as error:
        found.fault = ("image too large", str(error))
    except PixelError as error:
        found.fault = ("pixels that are no colours", str(error))
    # OSError: no permission. OverflowError, MemoryError: sizes no image has.
    except (ValueError, OSError, MemoryError, OverflowError) as error:
        found.fault = ("damaged file", str(error))
    return found
