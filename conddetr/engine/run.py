"""A training run from its configuration, for the command line and for `Detector.train`."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conddetr.config import ModelConfig, nearest
from conddetr.config.augment import AugmentConfig, shapes_augment
from conddetr.config.run import DataConfig, RunConfig, unused
from conddetr.engine import distributed
from conddetr.engine.checkpoint import LATEST, has_run
from conddetr.engine.lock import sole_run
from conddetr.engine.loggers import RunLogger
from conddetr.engine.parameters import Frozen, freeze, matches
from conddetr.engine.progress import say
from conddetr.engine.trainer import Trainer
from conddetr.model.detr import DETR
from conddetr.weights.load import LoadReport, start_from
from conddetr.weights.public import locate
from conddetr.zoo import build, gflops

if TYPE_CHECKING:
    from conddetr.data.coco import CocoDetection
    from conddetr.data.layouts import Layout
    from conddetr.data.sets import ImageSet
    from conddetr.data.synthetic import SyntheticShapes


log = logging.getLogger(__name__)


def data_sets(
    data: DataConfig, model: ModelConfig, augment: AugmentConfig | None = None
) -> tuple["CocoDetection | SyntheticShapes", "CocoDetection | SyntheticShapes"]:
    """Training and validation set.

    Args:
        data: where the images are.
        model: the model's configuration, which gives the sizes.
        augment: how training images are augmented; default: `paper`, and synthetic shapes never.

    Raises:
        ValueError: an option has no effect with the others, or synthetic shapes would be augmented; the two sets have
            different categories; there is nothing to train on; or as `CocoDetection`.
        FileNotFoundError: as `CocoDetection`.
    """
    from conddetr.data.coco import coco_split, folder_sets, layout_sets
    from conddetr.data.layouts import find_layout
    from conddetr.data.synthetic import SyntheticShapes
    from conddetr.data.transforms import EvalTransform, TrainTransform
    from conddetr.engine.categories import check_splits

    data.check_used()
    transforms = TrainTransform(model, augment or "paper"), EvalTransform(model)
    if data.kind == "synthetic":
        if augment not in (None, AugmentConfig()):
            shapes_augment(**augment.switches())
        size = model.image_size
        return SyntheticShapes(data.train_images, 1, size), SyntheticShapes(data.val_images, 2, size)
    if data.kind == "dataset":
        layout = find_layout(data.dataset)
        if data.val_fraction != DataConfig.val_fraction:
            _check_divided(layout)
        if distributed.is_main():
            say(layout.describe())
        train_set, val_set = layout_sets(layout, *transforms, data.val_fraction)
    elif data.kind == "coco_path":
        train_set, val_set = (
            coco_split(data.coco_path, split, transform)
            for split, transform in zip(("train", "val"), transforms, strict=True)
        )
    else:
        validation = (data.val_fraction, data.val_folder, data.val_annotations)
        train_set, val_set = folder_sets(data.images, data.annotations, *transforms, *validation)
    check_splits(train_set.classes, val_set.classes)
    _check_annotated(train_set, val_set)
    _note_shared_images(train_set, val_set)
    return train_set, val_set


def _check_divided(layout: "Layout") -> None:
    """Refuse `val_fraction` if a data set has its own validation images."""
    if "val" in layout.splits:
        raise ValueError(
            f"Data option val_fraction has no effect, because {layout.root} has validation images: leave it out."
        )


def _check_annotated(train_set: "CocoDetection", val_set: "CocoDetection") -> None:
    """Refuse to train without training objects or validation annotations; warn if validation has no objects."""
    if train_set.objects == 0:
        crowds, dropped = train_set.crowds, train_set.dropped_boxes
        unusable = [f"{crowds} crowds (`iscrowd` 1, which are not trained on)"] if crowds else []
        unusable += [f"{dropped} boxes without area inside their image"] if dropped else []
        advice = (
            " Some tools export every mask as a crowd: write `iscrowd` 0 for single objects."
            if crowds
            else " conddetr validate-data shows them."
            if dropped
            else " Check that the export includes annotations."
        )
        raise ValueError(
            f"There is nothing to learn. In {train_set.source}: {' and '.join(unusable) or 'no boxes at all'}, and no "
            f"other objects.{advice}"
        )
    if not val_set.is_annotated:
        raise ValueError(
            f"Annotation file {val_set.annotation_file} has no list 'annotations': it cannot be used for validation."
        )
    if val_set.objects == 0:
        log.warning(
            "There is nothing to measure: %s has no objects (%d crowds), so there are no metrics and no best.pt.",
            val_set.source,
            val_set.crowds,
        )


def _note_shared_images(train_set: "CocoDetection", val_set: "CocoDetection") -> None:
    """Warn if validation images are also training images."""
    shared = len(set(val_set.files()).intersection(train_set.files()))
    if shared:
        log.warning(
            "%d of the %d validation images are training images too: metrics on them say nothing about new images.",
            shared,
            len(val_set),
        )


def evaluation_set(
    chosen: Mapping[str, Any],
    training_data: DataConfig | None,
    classes: Sequence[dict[str, Any]],
    model: ModelConfig,
    split: str = "val",
) -> "ImageSet":
    """The data to evaluate a detector on.

    An annotation file that is named (`annotations` with `images`, or `val_annotations` with `val_folder`): all its
    images. With `val_fraction`, or on the detector's own training data: the images that training holds out.

    Args:
        chosen: fields of `DataConfig`; if they name no images, they override fields of `training_data`.
        training_data: the detector's training data, if known.
        classes: the detector's classes.
        model: the detector's configuration.
        split: `val` or `test` of a `dataset`.

    Raises:
        ValueError: unknown option (with the nearest name), or one that has no effect with the others; no images are
            named, and the detector was not trained on synthetic shapes; or as `CocoDetection`.
        FileNotFoundError: as `CocoDetection`.
    """
    from conddetr.data.annotations import read_annotations
    from conddetr.data.coco import CocoDetection, coco_split, divided, layout_split
    from conddetr.data.layouts import find_layout
    from conddetr.data.synthetic import SyntheticShapes
    from conddetr.data.transforms import EvalTransform

    data = _evaluation_data(chosen, training_data, classes)
    transform = EvalTransform(model)
    if split != "val" and data.kind != "dataset":
        raise ValueError(unused("split", data.kind))
    if data.kind == "synthetic":
        return SyntheticShapes(data.val_images, 2, model.image_size)
    if data.kind == "dataset":
        layout = find_layout(data.dataset)
        if "val_fraction" in chosen:
            _check_divided(layout)
        if distributed.is_main():
            say(layout.describe())
        return layout_split(layout, split, transform, data.val_fraction)
    if data.kind == "coco_path":
        return coco_split(data.coco_path, "val", transform)
    if data.val_annotations:
        return CocoDetection(data.val_folder or data.images, data.val_annotations, transform)
    annotations = read_annotations(data.annotations)
    return CocoDetection(data.images, annotations, transform, divided(annotations, data.val_fraction)[1])


def _evaluation_data(
    chosen: Mapping[str, Any], training_data: DataConfig | None, classes: Sequence[dict[str, Any]]
) -> DataConfig:
    """The data that `evaluation_set` reads; a file to be evaluated completely is its `val_annotations`."""
    from conddetr.data.synthetic import CLASSES

    known = [option.name for option in fields(DataConfig)]
    for name in chosen:
        if name not in known:
            raise ValueError(f"Unknown data option {name!r}.{nearest(name, known)}")
    if chosen.get("val_annotations"):
        folder = (
            chosen.get("val_folder")
            or chosen.get("images")
            or (training_data.val_folder or training_data.images if training_data else "")
        )
        data = DataConfig(annotations=chosen["val_annotations"], images=folder)
        used = {"val_annotations", "val_folder" if chosen.get("val_folder") else "images"}
    elif any(chosen.get(name) for name in ("dataset", "coco_path", "annotations")):
        data = DataConfig(**chosen)
        used = {"annotations": {"annotations", "images", "val_fraction"}, "dataset": {"dataset", "val_fraction"}}.get(
            data.kind, {data.kind}
        )
    elif training_data is not None:
        data, used = replace(training_data, **chosen), _changeable(training_data)
    else:
        names = [category["name"] for category in classes]
        data, used = DataConfig(**chosen), _OF_SHAPES
        if data.kind == "synthetic" and names != list(CLASSES):
            raise ValueError(
                f"No data to evaluate on: the detector's training data is not known, and its {len(names)} classes, "
                f"first {names[0]!r}, are not those of the synthetic shapes. Give dataset, coco_path, or annotations "
                "and images."
            )
    for name in chosen:
        if name not in used:
            has_own_file = chosen.get("val_annotations") or (
                data.val_annotations and name not in ("images", "val_folder")
            )
            raise ValueError(unused(name, "val_annotations" if has_own_file else data.kind))
    is_whole = chosen.get("val_annotations") or (chosen.get("annotations") and "val_fraction" not in chosen)
    return replace(data, val_annotations=data.annotations, val_folder=data.images) if is_whole else data


def official_evaluation(data: DataConfig, chosen: Collection[str]) -> dict[str, Any]:
    """Options for `evaluation_set` from the options of a training with `--eval`: those of its validation images.

    Args:
        data: the training's options.
        chosen: names of the options that were given, by flags or a file; a file may name all.

    Raises:
        ValueError: an option has no effect with the others.
    """
    data.check_used()
    training_only = {"train_images"} | ({"annotations", "val_fraction"} if data.val_annotations else set())
    training_only |= {"images"} if data.val_folder else set()
    given = {name: value for name, value in asdict(data).items() if name in chosen and name not in training_only}
    default = asdict(DataConfig())
    keeps_share = data.kind == "annotations"
    return {
        name: value
        for name, value in given.items()
        if value != default[name] or (name == "val_fraction" and keeps_share)
    }


_OF_SHAPES = {"train_images", "val_images"}
"""Options of synthetic shapes; a script may pass the same options to `evaluate` as to `train`."""


def _changeable(training_data: DataConfig) -> set[str]:
    """Options that may override a training's data: which of its images are evaluated, or where they are."""
    if training_data.val_annotations:
        return {"val_folder"} if training_data.val_folder else {"val_folder", "images"}
    by_kind = {"synthetic": _OF_SHAPES, "annotations": {"images", "val_fraction"}, "dataset": {"val_fraction"}}
    return by_kind.get(training_data.kind, set())


def train(
    run: RunConfig,
    start: dict[str, Any] | None = None,
    show_config: bool = True,
    loggers: Sequence[RunLogger] = (),
) -> Trainer:
    """Train as configured; under torchrun, together with the other processes.

    Args:
        run: from `resolve_run`.
        start: weights to start from, as a checkpoint's content, instead of the file `run.weights`.
        show_config: print the whole configuration at the start.
        loggers: receive the run's records too, beside those that `run.log_to` names.

    Returns:
        The trainer, after training.

    Raises:
        FileExistsError: another run trains in the folder; the message names it.
        ImportError, OSError, ValueError, FloatingPointError, InterruptedRunError: see `Trainer`.
    """
    with distributed.process_group(run.device) as device, sole_run(run.output_dir):
        train_set, val_set = data_sets(run.data, run.model, run.augment)
        resume = _file_to_resume(run)
        # A resumed run and named weights replace the pretrained backbone.
        weights = None if resume else start or (run.weights and locate(run.weights, run.preset))
        run = replace(run, pretrained_backbone=run.pretrained_backbone and not (resume or weights))
        torch.manual_seed(run.train.seed)
        build_options = {"backend": run.backend, "pretrained_backbone": run.pretrained_backbone}
        model = build(run.preset, **build_options, **{**run.model.to_dict(), "num_classes": len(train_set.classes)})
        # The trainer does this too. Here it is early enough for the printed numbers, and for an error before any work.
        frozen = freeze(model, run.train.freeze)
        if distributed.is_main():
            _print_start(run, model, train_set, val_set, show_config)
        report = start_from(model, train_set.classes, weights) if weights else None
        if report and distributed.is_main():
            say(f"starting from weights: {report}")
        if not resume:
            note_random_parts(frozen, report, run.pretrained_backbone)
        trainer = Trainer(model, train_set, val_set, run, device, loggers)
        if resume:
            trainer.resume(resume)
            if trainer.is_main:
                _print_resumed(trainer)
        trainer.fit()
    return trainer


def note_random_parts(frozen: Frozen, report: LoadReport | None, pretrained_backbone: bool) -> None:
    """Warn if frozen parameters hold random values, which will stay.

    Args:
        frozen: the frozen parameters.
        report: of loading weights to start from; None: there are none.
        pretrained_backbone: whether the backbone is pretrained.
    """
    names = [name for own in frozen.names.values() for name in own]
    if report is not None:
        names = [name for name in names if any(entry.startswith(f"{name}:") for entry in report.mismatched)]
    elif pretrained_backbone:
        names = [name for name in names if not matches("backbone", name)]
    if names and distributed.is_main():
        log.warning(
            "%d frozen parameter tensors hold random values and keep them, first %s: start from trained weights "
            "(--weights), or do not freeze them.",
            len(names),
            names[0],
        )


def _file_to_resume(run: RunConfig) -> Path | None:
    if run.resume != "auto":
        return Path(run.resume) if run.resume else None
    return Path(run.output_dir) / LATEST if has_run(run.output_dir) else None


def _print_resumed(trainer: Trainer) -> None:
    position, batches = trainer.position, len(trainer.loader)
    progress = f"epoch {position.epoch + 1}, batch {position.batch} of {batches}, step {position.step}"
    say(f"resuming from {trainer.resumed_from}: {progress}")
    for change in trainer.changes:
        say(change)


def _print_start(run: RunConfig, model: DETR, train_set: "ImageSet", val_set: "ImageSet", show_config: bool) -> None:
    if show_config:
        for section, options in replace(run, model=model.config).to_dict().items():
            shown = options if isinstance(options, dict) else {section: options}
            title = f"{section}: " if isinstance(options, dict) else ""
            line = "  ".join(f"{name}={value}" for name, value in shown.items())
            say(f"{title}{line}")
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    processes = distributed.world_size()
    say(
        f"{run.preset}: {total:,} parameters, {trainable:,} trainable, {gflops(model):.4g} GFLOPs; "
        f"{len(train_set)} training and {len(val_set)} validation images"
        + (f"; {processes} processes" if processes > 1 else "")
    )
    for name, data in (("training", train_set), ("validation", val_set)):
        say(f"{name}: {data.describe()}")
