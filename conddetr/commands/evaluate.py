"""`conddetr eval`."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conddetr.commands.shared import print_chosen
from conddetr.config.flags import chosen_data
from conddetr.config.run import unused
from conddetr.data.batch import check_loading
from conddetr.detector import Detector
from conddetr.engine import distributed
from conddetr.engine.coco_metrics import CocoResult, coco_library, coco_result
from conddetr.engine.evaluator import detect
from conddetr.engine.progress import say, show
from conddetr.engine.run import evaluation_set
from conddetr.engine.tables import class_table, metrics_table
from conddetr.files import check_json_target, refuse_overwriting, write_text


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
    loading = options.batch_size, options.workers
    result = coco_numbers(*source, data, *loading, options.results, options.classes_by_name, options.split)
    if result is None:
        return
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


def coco_numbers(
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
) -> CocoResult | None:
    """COCO metrics of a checkpoint, together with torchrun's other processes; None on all ranks but 0, and if the
    images have no annotations.

    `data` and `split` are those of `evaluation_set`, `by_name` that of `detect`; detections are written to `results`.
    """

    check_loading(batch_size, workers)
    with distributed.process_group(device or "") as process_device:
        detector = Detector.from_checkpoint(checkpoint, preset, str(process_device), backend, precision)
        val_set = evaluation_set(data, detector.data, detector.classes, detector.config, split)
        # A missing library is reported now, not after the detections are computed.
        if val_set.is_annotated:
            coco_library()
        elif not results:
            raise ValueError(
                f"Annotation file {val_set.annotation_file} has no list 'annotations', so there is nothing to compare "
                "detections with; --results FILE writes the detections."
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
    return coco_result(val_set.ground_truth(), detections, source=val_set.source)
