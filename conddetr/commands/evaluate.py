"""`conddetr eval`."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conddetr.commands.shared import print_chosen
from conddetr.config.flags import chosen_data
from conddetr.config.run import unused
from conddetr.data.loader import check_loading
from conddetr.data.sets import ImageSet
from conddetr.detector import Detector
from conddetr.engine import distributed
from conddetr.engine.coco_metrics import CocoResult, Detections, coco_library, coco_result
from conddetr.engine.evaluator import detect
from conddetr.engine.progress import say, show
from conddetr.engine.run import evaluation_set
from conddetr.engine.tables import class_table, metrics_table
from conddetr.files import check_json_target, refuse_overwriting, write_text
from conddetr.viz.report import check_report_target, facts, report_beside, write_report


def run(options: argparse.Namespace) -> None:
    source = options.checkpoint, options.preset, options.device, options.backend, options.precision
    data = chosen_data(options)
    if "train_images" in data:
        raise ValueError(unused("train_images", "eval"))
    inputs = options.checkpoint, *(value for value in data.values() if isinstance(value, str))
    check_json_target("--results", options.results)
    check_json_target("--out", options.out)
    refuse_overwriting("--results", options.results, inputs)
    refuse_overwriting("--out", options.out, (*inputs, options.results))
    report = report_beside(options.checkpoint) if options.report == "" else options.report
    if report:
        check_report_target("--report", report)
        refuse_overwriting("--report", report, (*inputs, options.results, options.out))
    loading = options.batch_size, options.workers
    choice = options.results, options.classes_by_name, options.split
    evaluation = evaluate_checkpoint(*source, data, *loading, *choice, needs_annotations=bool(report))
    if evaluation is None:
        return
    result = evaluation.result
    data = {"source": result.source, "images": result.images, "objects": result.objects, "library": result.library}
    per_class = {"per_class": [vars(row) for row in result.per_class]} if options.per_class else {}
    content = {**result.metrics, "data": data, **per_class}
    try:
        if options.per_class:
            show("classes, in percent", class_table(result.per_class))
        show(f"COCO metrics of {options.checkpoint}, in percent", metrics_table(result.metrics))
        say(result.describe())
    finally:
        # The file is written even if the pipe of the output ends early; the metrics are shown even if writing fails.
        if options.out:
            write_text(options.out, json.dumps(content, indent=1) + "\n")
        if report:
            about = {"checkpoint": options.checkpoint, **facts(evaluation.detector)}
            say(write_report(report, result, evaluation.truth, evaluation.detections, evaluation.dataset, about))


@dataclass(frozen=True)
class Evaluation:
    """COCO metrics of a checkpoint, and what they were computed from."""

    result: CocoResult
    detector: Detector
    dataset: ImageSet
    truth: dict
    """Ground truth in COCO's format."""
    detections: Detections


def evaluate_checkpoint(
    checkpoint: str | Path,
    preset: str | None,
    device: str | None,
    backend: str,
    precision: str,
    data: Mapping[str, Any],
    batch_size: int,
    workers: int,
    results: str | None = None,
    by_name: bool = False,
    split: str = "val",
    needs_annotations: bool = False,
) -> Evaluation | None:
    """COCO metrics of a checkpoint, together with torchrun's other processes; None on all ranks but 0, and if the
    images have no annotations.

    `data` and `split` are those of `evaluation_set`, `by_name` that of `detect`; detections are written to `results`.

    Raises:
        ValueError: the images have no annotations, and either `needs_annotations` or no `results`.
    """

    check_loading(batch_size, workers)
    with distributed.process_group(device or "") as process_device:
        detector = Detector.from_checkpoint(checkpoint, preset, str(process_device), backend, precision)
        val_set = evaluation_set(data, detector.data, detector.classes, detector.config, split)
        # A missing library is reported now, not after the detections are computed.
        if val_set.is_annotated:
            coco_library()
        elif needs_annotations or not results:
            raise ValueError(
                f"Annotation file {val_set.annotation_file} has no list 'annotations', so there is nothing to compare "
                f"detections with; --results FILE{' without --report' if needs_annotations else ''} writes the "
                "detections."
            )
        print_chosen(detector, process_device)
        group = distributed.rank(), distributed.world_size()
        options = {"by_name": by_name, "precision": detector.precision}
        detections = detect(
            detector.model, detector.classes, val_set, process_device, batch_size, workers, *group, **options
        )
    if detections is None:
        return None
    if results:
        detections.write(results)
        say(f"{val_set.source}: {len(val_set)} images, {len(detections)} detections; wrote {results}")
    if not val_set.is_annotated:
        say(f"{val_set.source} has no annotations: there are no metrics.")
        return None
    truth = val_set.ground_truth()
    return Evaluation(coco_result(truth, detections, source=val_set.source), detector, val_set, truth, detections)
