"""A report on the quality of a detector as one HTML file: it loads nothing, needs no network and no script."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from conddetr.data.sets import ImageSet
from conddetr.engine.coco_metrics import CocoResult, Detections
from conddetr.engine.quality import measure_quality
from conddetr.files import write_text
from conddetr.viz.report.page import render
from conddetr.viz.report.pictures import missed_objects, wrong_detections

if TYPE_CHECKING:
    from conddetr.detector import Detector

FILE = "report.html"
"""Default name of a report."""
_MARK = b'<meta name="generator" content="conddetr">'
"""In the first bytes of every report, so that no other file is replaced."""
_BEGINNING = 1024


def report_beside(checkpoint: str | Path) -> Path:
    """The default path of a report: in the checkpoint's folder."""
    checkpoint = Path(checkpoint)
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / FILE


def check_report_target(option: str, path: str | Path) -> None:
    """Refuse, before any work, to write a report over anything but an earlier report.

    Args:
        option: the option that names the file, for the message.
        path: the file to write.

    Raises:
        ValueError: the path does not end in `.html`, or there is a folder or another file.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{option} {path}: expected a name ending in .html, got {path.name!r}.")
    if path.is_dir():
        raise ValueError(f"{option} {path}: expected a name for an HTML file, got a folder.")
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(_BEGINNING)
        if start.strip() and _MARK not in start:
            raise ValueError(f"{option} {path}: the file exists and is not a report of conddetr: name another file.")


def facts(detector: "Detector") -> dict[str, str]:
    """What a report says of a detector, for `about` in `write_report`: its model, training run and precision."""
    config, run = detector.model.config, detector.run or {}
    training = {"training": run["output_dir"]} if run.get("output_dir") else {}
    model = f"{config.family}, {config.backbone}, {config.num_queries} queries"
    return {"model": model, **training, "computed in": detector.precision}


def write_report(
    path: str | Path,
    result: CocoResult,
    ground_truth: dict,
    detections: Detections,
    dataset: ImageSet,
    about: Mapping[str, str],
) -> str:
    """Write a report; an older one is replaced.

    Args:
        path: the HTML file.
        result: COCO's metrics of these detections.
        ground_truth: `dataset.ground_truth()`.
        detections: detections in the data set's images.
        dataset: the evaluated images; parts of them show the worst errors.
        about: name and text of further facts about the detector, such as its checkpoint.

    Returns:
        One line for the terminal: the file, and how many images could not be read.

    Raises:
        OSError: the file cannot be written.
    """
    quality = measure_quality(ground_truth, detections, result.source)
    images = ground_truth["images"]

    def read(position: int) -> Tensor:
        # At its own size: the model's may be too small to look at.
        return dataset.load(position, dataset.whole_plan(position))[0]

    wrong = wrong_detections(quality, images, read)
    missed = missed_objects(quality, images, read)
    write_text(path, render(result, quality, about, wrong, missed))
    faults = [picture.fault for picture in (*wrong, *missed) if picture.fault]
    unread = f"; {len(faults)} of its pictures are missing, first: {faults[0]}" if faults else ""
    return f"wrote {path}{unread}"
