"""`conddetr validate-data`."""

import argparse
import json
from pathlib import Path

from conddetr.config.run import DataConfig
from conddetr.data.annotations import Annotations
from conddetr.data.coco import coco_files
from conddetr.data.fix import fix
from conddetr.data.layouts import CocoSplit, find_layout
from conddetr.data.validate import ValidationReport, compare_splits, validate
from conddetr.engine.progress import Progress, console, say, show
from conddetr.files import check_json_target, refuse_overwriting, write_text


def run(options: argparse.Namespace) -> int:
    if options.fix and (not options.annotations or options.val_annotations):
        raise ValueError("--fix cleans one annotation file: name it with --annotations, and its images with --images.")
    sources = _sources_to_validate(options)
    files = [source for _, source in sources.values() if isinstance(source, str | Path)]
    check_json_target("--report", options.report)
    check_json_target("--fix", options.fix)
    refuse_overwriting("--report", options.report, files)
    refuse_overwriting("--fix", options.fix, [*files, options.report])
    reports = {}
    for split, (images, annotations) in sources.items():
        with Progress(f"validate {split}", total=None) as progress:
            reports[split] = validate(
                images,
                annotations,
                split == "train",
                options.processes,
                lambda done, total: progress.advance(done, total=total),
            )
    for split, report in reports.items():
        if split != "train" and "train" in reports:
            compare_splits(reports["train"], report)
    return _fixed_or_reported(options, list(reports.values()))


def _sources_to_validate(options: argparse.Namespace) -> dict[str, tuple[str | Path, str | Path | Annotations]]:
    """Image folder and annotations (a file, or annotations that are read already) by `train`, `val` and `test`."""

    names = ("dataset", "coco_path", "annotations", "images", "val_annotations", "val_folder")
    given = {name: getattr(options, name) for name in names}
    DataConfig(**{name: value for name, value in given.items() if value}).check_used()
    if options.dataset:
        layout = find_layout(options.dataset)
        say(layout.describe())
        return {
            name: (split.images, split.source if isinstance(split, CocoSplit) else split.read())
            for name, split in layout.splits.items()
        }
    if options.coco_path:
        root = Path(options.coco_path)
        if not any((root / f"{split}2017").is_dir() for split in ("train", "val")):
            coco_files(root, "train")
        return {
            split: (root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json")
            for split in ("train", "val")
        }
    sources = {"train": (options.images, options.annotations)}
    if options.val_annotations:
        sources["val"] = (options.val_folder or options.images, options.val_annotations)
    return sources


def _fixed_or_reported(options: argparse.Namespace, reports: list[ValidationReport]) -> int:
    """Print the reports, carry out --fix and --report; returns the exit status.

    The report file is written even if the pipe of the output ends early.
    """

    ok = all(report.ok for report in reports)
    content = {"ok": ok, "data_sets": [report.to_dict() for report in reports]}
    try:
        for report in reports:
            say(report.summary())
            console.print(*report.tables(), sep="\n")
        if options.fix:
            fixed = fix(reports[0], options.fix)
            content["fixed"] = fixed.to_dict()
            show(fixed.summary(), fixed.table())
            say("The copy has no errors: train on it.")
    finally:
        if options.report:
            write_text(options.report, json.dumps(content, indent=1) + "\n")
    return 0 if ok or options.fix else 1
