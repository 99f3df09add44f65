"""Training: one process, one device.

Source of the recipe: Conditional DETR, section 4.1; `main.py` and `engine.py` of the official code.
"""

import json
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conddetr.data.batch import Batch, make_loader
from conddetr.engine.checkpoint import read_checkpoint, save_checkpoint
from conddetr.engine.evaluator import coco_library, evaluate
from conddetr.engine.progress import Progress, console
from conddetr.model.detr import DETR
from conddetr.zoo import build_criterion


@dataclass
class TrainConfig:
    """How to train. The defaults are the paper's 50-epoch schedule, per GPU."""

    epochs: int = 50
    batch_size: int = 2
    """Images per step."""
    lr: float = 1e-4
    """Learning rate of everything but the backbone."""
    lr_backbone: float = 1e-5
    """Learning rate of the backbone."""
    lr_drop: int = 40
    """Epoch at which both learning rates are divided by ten."""
    weight_decay: float = 1e-4
    clip_max_norm: float = 0.1
    """Largest norm of the gradient of all parameters together; 0 turns clipping off."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    workers: int = 2
    """Processes that load images; 0 loads them in the training process."""
    seed: int = 42
    time_limit: float = 0.0
    """Stop training after so many seconds, evaluation not counted, as if the epochs were over; 0: no limit."""


def tiny_train_config() -> TrainConfig:
    """The defaults for the tiny presets on the synthetic set: a few minutes on two CPU cores."""
    return TrainConfig(epochs=16, batch_size=8, lr=7e-4, lr_backbone=7e-4, lr_drop=13, eval_every=8, workers=0)


class Trainer:
    """Trains a model and leaves `checkpoint.pt` and `log.jsonl` in a folder after every epoch."""

    def __init__(
        self,
        model: DETR,
        train_set: Dataset,
        val_set: Dataset,
        config: TrainConfig,
        output_dir: str | Path,
        device: torch.device,
    ) -> None:
        """
        Args:
            model: with as many classes as the data set has.
            train_set, val_set: `CocoDetection` or `SyntheticShapes`.
            config: how to train.
            output_dir: created if absent.
            device: where to train.

        Raises:
            ValueError: the model's number of classes is not the data set's.
        """
        if model.config.num_classes != len(train_set.classes):
            raise ValueError(
                f"num_classes: the data set has {len(train_set.classes)} classes, "
                f"the model was built for {model.config.num_classes}."
            )
        self.model, self.config, self.device = model.to(device), config, device
        self.criterion = build_criterion(model.config).to(device)
        self.train_set, self.val_set = train_set, val_set
        self.output_dir = Path(output_dir)
        self.optimizer = make_optimizer(model, config)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, config.lr_drop)
        self.start_epoch = 0
        self.resumed_from: Path | None = None
        self.seconds = 0.0
        """Time spent training so far."""

    def resume(self, path: str | Path) -> None:
        """Continue from the end of the epoch that a checkpoint of the same run holds."""
        content = read_checkpoint(path)
        absent = [key for key in ("model", "optimizer", "schedule", "epoch") if key not in content]
        if absent:
            raise ValueError(f"Checkpoint {path} can not be resumed: it has no {absent[0]!r}, only weights.")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.start_epoch = content["epoch"] + 1
        self.resumed_from = Path(path)

    def fit(self) -> dict[str, float]:
        """Train to the end; returns the metrics of the last evaluation.

        Raises:
            FileExistsError: the folder holds another run's checkpoint, which would be overwritten.
            ValueError: fewer training images than a batch, or a prediction that is not a number.
            FloatingPointError: the loss is not finite; names the images.
            ModuleNotFoundError: no library for COCO's metrics is installed.
        """
        # Every run ends with an evaluation: better refused now than after the last epoch.
        coco_library()
        earlier = self.output_dir / "checkpoint.pt"
        if earlier.exists() and self.resumed_from is None:
            raise FileExistsError(f"{earlier} is from an earlier run: resume it, delete it or name another folder.")
        if self.start_epoch >= self.config.epochs:
            done = f"{self.start_epoch} epochs of {self.config.epochs}"
            raise ValueError(f"epochs: {self.resumed_from} already holds {done}: ask for more.")
        seed_everything(self.config.seed + self.start_epoch)
        batches = make_loader(
            self.train_set,
            self.config.batch_size,
            train=True,
            workers=self.config.workers,
            seed=self.config.seed,
            device=self.device,
        )
        metrics: dict[str, float] = {}
        for epoch in range(self.start_epoch, self.config.epochs):
            record = {
                "epoch": epoch,
                "lr": self.optimizer.param_groups[0]["lr"],
                **self._epoch(epoch, batches),
            }
            self.schedule.step()
            is_last = epoch + 1 == self.config.epochs or self._out_of_time()
            if is_last or (epoch + 1) % self.config.eval_every == 0:
                metrics = self._evaluate()
                record.update(metrics)
            self._save(epoch, metrics)
            self._log(record)
            if is_last:
                break
        return metrics

    def _epoch(self, epoch: int, batches: DataLoader) -> dict[str, float]:
        """Train one epoch; returns mean losses and speed."""
        self.model.train()
        batches.sampler.set_epoch(epoch)
        sums: dict[str, float] = defaultdict(float)
        images, start = 0, time.perf_counter()
        before = self.seconds
        with Progress(f"epoch {epoch + 1}/{self.config.epochs}", total=len(self.train_set)) as progress:
            for step, batch in enumerate(batches, start=1):
                for name, value in self._step(batch).items():
                    sums[name] += value
                images += len(batch)
                self.seconds = before + time.perf_counter() - start
                progress.advance(len(batch), _note(sums, step))
                if self._out_of_time():
                    break
        speed = images / (self.seconds - before)
        return {**{name: value / step for name, value in sums.items()}, "images_per_second": speed}

    def _step(self, batch: Batch) -> dict[str, float]:
        batch = batch.to(self.device)
        losses = self.criterion(self.model(batch.model_input(), valid_hw=batch.valid_hw), batch.targets)
        names, values = zip(*losses.items(), strict=True)
        # One copy to the host for all that is logged.
        values = dict(zip(names, torch.stack([value.detach() for value in values]).tolist(), strict=True))
        if not np.isfinite(values["loss"]):
            bad = [name for name, value in values.items() if not np.isfinite(value)]
            raise FloatingPointError(f"The loss is not finite: {bad[1:] or bad} on image ids {list(batch.image_ids)}.")
        self.optimizer.zero_grad()
        losses["loss"].backward()
        if self.config.clip_max_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_max_norm)
        self.optimizer.step()
        return values

    def _out_of_time(self) -> bool:
        return 0 < self.config.time_limit <= self.seconds

    def _evaluate(self) -> dict[str, float]:
        return evaluate(
            self.model,
            self.train_set.classes,
            self.val_set,
            self.device,
            self.config.batch_size,
            self.config.workers,
        ).metrics

    def _save(self, epoch: int, metrics: dict[str, float]) -> None:
        save_checkpoint(
            self.output_dir / "checkpoint.pt",
            {
                "model": self.model.state_dict(),
                "config": self.model.config.to_dict(),
                "classes": self.train_set.classes,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "epoch": epoch,
                "metrics": metrics,
                "train_config": asdict(self.config),
            },
        )

    def _log(self, record: dict[str, float]) -> None:
        with open(self.output_dir / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        line = f"epoch {record['epoch'] + 1}/{self.config.epochs}  loss {record['loss']:.3f}"
        line += f"  {record['images_per_second']:.1f} images/s  {self.seconds:.0f} s"
        if "AP" in record:
            line += f"  AP {100 * record['AP']:.1f}  AP50 {100 * record['AP50']:.1f}"
        console.print(line, highlight=False)


def _note(sums: dict[str, float], steps: int) -> str:
    """Mean losses so far, for the progress bar."""
    shown = {"loss": "loss", "class": "loss_ce", "L1": "loss_bbox", "GIoU": "loss_giou"}
    return "  ".join(f"{title} {sums[name] / steps:.3f}" for title, name in shown.items())


def make_optimizer(model: DETR, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with one learning rate for the backbone and another for the rest; frozen parameters left out."""
    groups: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("backbone.")].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[False]}, {"params": groups[True], "lr": config.lr_backbone}],
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=True,
    )


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and Python."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
