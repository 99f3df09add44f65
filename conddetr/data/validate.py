"""A data set read from end to end before hours are spent on it: what is wrong, what is odd, and where.

Errors would stop or spoil a training run; warnings tell what a person should know.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from conddetr.config import check_least
from conddetr.data.annotations import SECTIONS, entry_fault
from conddetr.data.images import read_image
from conddetr.processes import can_start_workers, cores, ignore_interrupts, interrupts_held

MIN_IMAGES_FROM_SCRATCH = 10_000
"""Below this, detection transformers trained from random weights stay far under what pretrained ones reach: they learn
from data alone what convolutions or anchors have built in. The paper trains on 118,287 images."""
MIN_OBJECTS_PER_CLASS = 50
BALANCE = 100.0
"""How many times more objects the largest class may have than the smallest before it is said."""
_EXAMPLES = 5
_SHOWN_CLASSES = 12
_HINT = "If there are many: boxes must be (x, y, width, height) in pixels of the file, not two corners."


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


@dataclass
class ValidationReport:
    """What was found in one data set."""

    annotation_file: str
    image_dir: str
    images: int = 0
    boxes: int = 0
    crowds: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    """Boxes per class name, crowds not counted."""
    findings: list[Finding] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict, repr=False)
    """File name by the hash of its bytes; not part of the written report."""

    @property
    def ok(self) -> bool:
        """No errors; warnings are allowed."""
        return all(finding.severity != "error" for finding in self.findings)

    def add(self, severity: str, kind: str, message: str, places: Iterable[str]) -> None:
        """Note a kind of problem, if there is any place where it occurs."""
        places = list(places)
        if places:
            self.findings.append(Finding(severity, kind, message, len(places), places[:_EXAMPLES]))

    def to_dict(self) -> dict:
        """Everything, for JSON."""
        content = {"ok": self.ok, **asdict(self)}
        del content["digests"]
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
        ordered = sorted(self.classes.items(), key=lambda item: -item[1])
        for name, count in ordered[:_SHOWN_CLASSES]:
            classes.add_row(Text(name), str(count))
        if ordered[_SHOWN_CLASSES:]:
            rest = [count for _, count in ordered[_SHOWN_CLASSES:]]
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


def validate(
    image_dir: str | Path,
    annotation_file: str | Path,
    train: bool = True,
    processes: int | None = None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> ValidationReport:
    """Check an annotation file and every image it names.

    Args:
        image_dir: folder of the images.
        annotation_file: JSON in COCO's format.
        train: whether to judge also if there is enough, and enough of each class, to train on.
        processes: that read images; default: one per core.
        on_image: called with the number of images just done and of all, for progress.

    Returns:
        The report; problems of the data never raise.

    Raises:
        ValueError: `processes` below 1.
    """
    if processes is not None:
        check_least("processes", processes, 1)
    report = ValidationReport(str(annotation_file), str(image_dir))
    content = _read_json(Path(annotation_file), report)
    if content is None:
        return report
    images, annotations, categories = _sound_entries(content, report)
    report.images = len(images)
    _check_categories(categories, report)
    _check_annotations(images, annotations, categories, report)
    _count_objects(images, annotations, categories, report)
    if train:
        _check_amounts(report)
    _check_files(images, Path(image_dir), report, processes, on_image)
    return report


def _read_json(path: Path, report: ValidationReport) -> dict | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        report.add("error", "missing annotation file", "The file does not exist.", [str(path)])
        return None
    # A deeply nested file exhausts the parser's stack.
    except (ValueError, OSError, RecursionError) as error:
        report.add("error", "unreadable annotation file", f"It is not JSON: {error}.", [str(path)])
        return None
    if not isinstance(content, dict):
        report.add("error", "unreadable annotation file", "Expected an object with three lists.", [str(path)])
        return None
    return content


def _sound_entries(content: dict, report: ValidationReport) -> tuple[list[dict], list[dict], list[dict]]:
    """Images, annotations and categories whose entries can be worked with; what can not, and repeated ids, is noted."""
    sections = []
    for section in SECTIONS:
        entries = content.get(section)
        if not isinstance(entries, list):
            report.add("error", "missing section", "The file needs this list.", [section])
            entries = []
        faults = [(position, entry_fault(section, entry)) for position, entry in enumerate(entries)]
        broken = [f"{section}[{position}]: {fault}" for position, fault in faults if fault]
        report.add("error", f"malformed {section}", "Entries that do not follow COCO's format.", broken)
        sound = [entry for entry, (_, fault) in zip(entries, faults, strict=True) if not fault]
        repeated = _repeated(entry["id"] for entry in sound)
        message = "Ids must be unique; all but the last of them would be lost."
        report.add("error", f"duplicate ids in {section}", message, (f"id {key}" for key in repeated))
        sections.append(sound)
    return tuple(sections)


def _repeated(values: Iterable) -> list:
    return [value for value, count in Counter(values).items() if count > 1]


def _check_categories(categories: list[dict], report: ValidationReport) -> None:
    if not categories:
        report.add("error", "no categories", "There is nothing to detect.", [report.annotation_file])
    repeated = _repeated(category["name"] for category in categories)
    report.add("warning", "duplicate class names", "Classes of one name look alike in every table.", repeated)


def _check_annotations(
    images: list[dict], annotations: list[dict], categories: list[dict], report: ValidationReport
) -> None:
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    known = {category["id"] for category in categories}
    places: dict[str, list[str]] = defaultdict(list)
    seen: Counter = Counter()
    for annotation in annotations:
        place = f"annotation {annotation['id']}, image {annotation['image_id']}"
        x, y, w, h = annotation["bbox"]
        if annotation["category_id"] not in known:
            places["unknown category"].append(f"{place}: category {annotation['category_id']}")
        if annotation["image_id"] not in sizes:
            places["unknown image"].append(place)
        elif w <= 0 or h <= 0:
            places["degenerate"].append(f"{place}: {annotation['bbox']}")
        else:
            height, width = sizes[annotation["image_id"]]
            if x >= width or y >= height or x + w <= 0 or y + h <= 0:
                places["outside"].append(f"{place}: {annotation['bbox']} in {height}×{width}")
            # One pixel is the rounding of many tools.
            elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
                places["reaching out"].append(f"{place}: {annotation['bbox']} in {height}×{width}")
        key = (annotation["image_id"], annotation["category_id"], x, y, w, h)
        seen[key] += 1
        if seen[key] == 2:
            places["identical"].append(place)
    for severity, key, kind, message in (
        ("error", "unknown category", "unknown category", "The category is not in the list of categories."),
        ("error", "unknown image", "unknown image", "The image is not in the list of images."),
        ("warning", "degenerate", "box without area", "Width or height is not positive; training leaves it out."),
        ("error", "outside", "box outside its image", f"No part is inside. {_HINT}"),
        ("warning", "reaching out", "box reaching out of its image", f"Training clips it. {_HINT}"),
        ("warning", "identical", "identical annotations", "Same image, class and box more than once."),
    ):
        report.add(severity, kind, message, places[key])


def _count_objects(
    images: list[dict], annotations: list[dict], categories: list[dict], report: ValidationReport
) -> None:
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    report.boxes, report.crowds = len(objects), len(annotations) - len(objects)
    counts = Counter(annotation["category_id"] for annotation in objects)
    report.classes = {category["name"]: counts[category["id"]] for category in categories}
    filled = {annotation["image_id"] for annotation in objects}
    empty = [f"image {image['id']}" for image in images if image["id"] not in filled]
    report.add("warning", "images without objects", "They teach what is background; too many slow learning.", empty)
    nothing = [report.annotation_file] if images and not objects else []
    report.add("error", "no objects", "There is nothing to learn from.", nothing)


def _check_amounts(report: ValidationReport) -> None:
    """Whether there is enough, and enough of each class, to train on."""
    absent = [name for name, count in report.classes.items() if count == 0]
    report.add("warning", "class without objects", "It can not be learned.", absent)
    rare = [f"{name}: {count}" for name, count in report.classes.items() if 0 < count < MIN_OBJECTS_PER_CLASS]
    report.add("warning", "rare class", f"Fewer than {MIN_OBJECTS_PER_CLASS} objects: expect a low AP.", rare)
    present = [count for count in report.classes.values() if count]
    if present and max(present) > BALANCE * min(present):
        message = f"The largest class has more than {BALANCE:.0f} times the objects of the smallest."
        report.add("warning", "unbalanced classes", message, [f"{max(present)} and {min(present)} objects"])
    if report.images < MIN_IMAGES_FROM_SCRATCH:
        message = (
            f"Fewer than {MIN_IMAGES_FROM_SCRATCH:,} images: a detection transformer learns from data alone what "
            "others have built in. Start from a trained detector's weights, not only from a pretrained backbone."
        )
        report.add("warning", "too small to train from scratch", message, [f"{report.images} images"])


def note_shared_images(train: ValidationReport, val: ValidationReport) -> None:
    """Warn in the report of the validation set of images that are in the training set too, byte for byte."""
    shared = [f"{name} = {train.digests[digest]}" for digest, name in val.digests.items() if digest in train.digests]
    val.add("warning", "images of the training set", "What is measured on them says nothing about new images.", shared)


def _check_files(
    images: list[dict],
    image_dir: Path,
    report: ValidationReport,
    processes: int | None,
    on_image: Callable[[int, int], None],
) -> None:
    """Read every image whole; compare size and content."""
    repeated = _repeated(image["file_name"] for image in images)
    report.add("error", "duplicate file names", "Two image ids name one file.", repeated)
    faults: dict[str, list[str]] = defaultdict(list)
    files_of = defaultdict(list)
    for name, fault, digest in _inspect_all(images, image_dir, processes):
        if fault:
            faults[fault[0]].append(fault[1])
        if digest and name not in files_of[digest]:
            files_of[digest].append(name)
        on_image(1, len(images))
    for kind, message in (
        ("missing file", "The image is not in the folder."),
        ("damaged file", "Truncated, corrupt or not an image: replace it or remove its entry."),
        ("size mismatch", "Boxes would be off: the file has another size than the annotations say."),
    ):
        report.add("error", kind, message, faults[kind])
    report.digests = {digest: names[0] for digest, names in files_of.items()}
    groups = [" = ".join(names) for names in files_of.values() if len(names) > 1]
    report.add("warning", "identical images", "The same bytes under several names.", groups)


_Inspection = tuple[str, tuple[str, str] | None, str]
"""File name; kind of fault and its description, or None; digest of the file's bytes."""


def _inspect_all(images: list[dict], image_dir: Path, processes: int | None) -> Iterator[_Inspection]:
    processes = min(processes or cores(), max(1, len(images) // 16))
    tasks = [(image_dir, image["file_name"], image["height"], image["width"]) for image in images]
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


def _inspect(task: tuple[Path, str, int, int]) -> _Inspection:
    """Read one image; in a worker process."""
    image_dir, name, height, width = task
    path = image_dir / name
    try:
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        found = tuple(read_image(path).shape[-2:])
    except FileNotFoundError:
        return name, ("missing file", name), ""
    # OSError: a folder, a name too long, no permission. OverflowError, MemoryError: sizes no image has.
    except (ValueError, OSError, MemoryError, OverflowError) as error:
        return name, ("damaged file", str(error)), ""
    if found != (height, width):
        text = f"{name}: annotations say height × width {height}×{width}, the file has {found[0]}×{found[1]}"
        return name, ("size mismatch", text), digest
    return name, None, digest
