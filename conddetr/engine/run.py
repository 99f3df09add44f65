"""A training run from its configuration: the same for the command line and for `Detector.train`."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conddetr.config import ModelConfig, nearest
from conddetr.engine import distributed
from conddetr.engine.checkpoint import LATEST, has_run
from conddetr.engine.config import DataConfig, RunConfig
from conddetr.engine.lock import sole_run
from conddetr.engine.progress import console
from conddetr.engine.trainer import Trainer
from conddetr.interop.official import start_from
from conddetr.model.detr import DETR
from conddetr.public_weights import locate
from conddetr.zoo import build, gflops

if TYPE_CHECKING:
    from torch.utils.data import Dataset


def data_sets(data: DataConfig, model: ModelConfig) -> tuple["Dataset", "Dataset"]:
    """Training and validation set: COCO's layout, a folder with one annotation file, or synthetic shapes.

    Raises:
        FileNotFoundError, ValueError: as `CocoDetection`.
    """
    from conddetr.data.coco import coco_split, folder_sets
    from conddetr.data.synthetic import SyntheticShapes
    from conddetr.data.transforms import EvalTransform, TrainTransform

    transforms = TrainTransform(model), EvalTransform(model)
    if data.coco_path:
        return coco_split(data.coco_path, "train", transforms[0]), coco_split(data.coco_path, "val", transforms[1])
    if data.annotations:
        own = (data.val_fraction, data.val_folder, data.val_annotations)
        return folder_sets(data.images, data.annotations, *transforms, *own)
    size = model.image_size
    return SyntheticShapes(data.train_images, 1, size), SyntheticShapes(data.val_images, 2, size)


def evaluation_data(
    chosen: Mapping[str, Any], of_run: DataConfig | None, classes: Sequence[dict[str, Any]]
) -> DataConfig:
    """The data to evaluate a detector on.

    Args:
        chosen: fields of `DataConfig`; where they name no images they change those of `of_run`.
        of_run: what the detector was trained on, if that is known.
        classes: the detector's.

    Raises:
        ValueError: unknown option (with the nearest name); no images are named, and the detector is not one of
            synthetic shapes.
    """
    from conddetr.data.synthetic import CLASSES

    known = [option.name for option in fields(DataConfig)]
    for name in chosen:
        if name not in known:
            raise ValueError(f"Unknown data option {name!r}.{nearest(name, known)}")
    if chosen.get("coco_path") or chosen.get("annotations"):
        return DataConfig(**chosen)
    if of_run is not None:
        return replace(of_run, **chosen)
    names = [category["name"] for category in classes]
    if names != list(CLASSES):
        raise ValueError(
            f"No data to evaluate on: the detector does not say what it was trained on, and its {len(names)} classes, "
            f"first {names[0]!r}, are not those of the synthetic shapes. Give coco_path, or annotations and images."
        )
    return DataConfig(**chosen)


def train(run: RunConfig, start: dict[str, Any] | None = None, show_config: bool = True) -> Trainer:
    """Train as configured; under torchrun, with the other processes.

    Args:
        run: from `resolve_run`.
        start: weights to start from, as the content of a checkpoint, instead of the file `run.weights`.
        show_config: print the whole configuration at the start.

    Returns:
        The trainer, its run done.

    Raises:
        FileExistsError: another run trains in the folder; names it.
        OSError, ValueError, FloatingPointError, InterruptedRunError: see `Trainer`.
    """
    with distributed.process_group(run.device) as device, sole_run(run.output_dir):
        train_set, val_set = data_sets(run.data, run.model)
        resume = _file_to_resume(run)
        # A resumed run brings its own weights; so do named ones.
        weights = None if resume else start or (run.weights and locate(run.weights, run.preset))
        downloads = run.model.pretrained_backbone and not (resume or weights)
        torch.manual_seed(run.train.seed)
        overrides = {**run.model.to_dict(), "num_classes": len(train_set.classes), "pretrained_backbone": downloads}
        model = build(run.preset, **overrides)
        if distributed.is_main():
            _print_start(run, model, len(train_set), len(val_set), show_config)
        if weights:
            report = start_from(model, train_set.classes, weights)
            if distributed.is_main():
                console.print(f"starting from weights: {report}", highlight=False, soft_wrap=True)
        trainer = Trainer(model, train_set, val_set, run, device)
        if resume:
            trainer.resume(resume)
            if trainer.is_main:
                _print_resumed(trainer)
        trainer.fit()
    return trainer


def _file_to_resume(run: RunConfig) -> Path | None:
    if run.resume != "auto":
        return Path(run.resume) if run.resume else None
    return Path(run.output_dir) / LATEST if has_run(run.output_dir) else None


def _print_resumed(trainer: Trainer) -> None:
    position, of_epoch = trainer.position, len(trainer.loader)
    where = f"epoch {position.epoch + 1}, batch {position.batch} of {of_epoch}, step {position.step}"
    console.print(f"going on from {trainer.resumed_from}: {where}", highlight=False, soft_wrap=True)


def _print_start(run: RunConfig, model: DETR, train: int, val: int, show_config: bool) -> None:
    if show_config:
        for section, options in replace(run, model=model.config).to_dict().items():
            shown = options if isinstance(options, dict) else {section: options}
            title = f"{section}: " if isinstance(options, dict) else ""
            line = "  ".join(f"{name}={value}" for name, value in shown.items())
            console.print(f"{title}{line}", highlight=False, soft_wrap=True)
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    processes = distributed.world_size()
    console.print(
        f"{run.preset}: {total:,} parameters, {trainable:,} trainable, {gflops(model.config):.4g} GFLOPs; "
        f"{train} training and {val} validation images" + (f"; {processes} processes" if processes > 1 else ""),
        highlight=False,
        soft_wrap=True,
    )
