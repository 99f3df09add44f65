"""Cost of checkpoints in training: steps at a save and while the file is written, against undisturbed steps.

python benchmarks/run.py checkpoint
"""

import tempfile
import time
from pathlib import Path
from statistics import mean, median

import torch
from rich.table import Table

from conddetr.config.run import resolve_run
from conddetr.engine.checkpoint import LATEST, CheckpointWriter, read_checkpoint
from conddetr.engine.run import data_sets
from conddetr.engine.trainer import Trainer
from conddetr.zoo import build
from harness.command import command
from harness.machine import DEVICE
from harness.show import show, spread
from harness.store import say_written, write

PRESETS = {"conditional-detr-tiny": {}, "conditional-detr-r50": {"image_size": 256, "max_image_size": 256}}
"""Preset → image size. Steps of the large preset take many times longer on real sizes; a save takes as long."""
CALM = 3
"""Undisturbed steps per save."""


def make_trainer(preset: str, sizes: dict[str, int], folder: str) -> Trainer:
    """A trainer of the preset with its defaults, on synthetic images."""
    options = {"preset": preset, "output_dir": folder, "train_images": 64, "val_images": 1, "workers": 0, **sizes}
    run = resolve_run({**options, "pretrained_backbone": False})
    train_set, val_set = data_sets(run.data, run.model)
    torch.manual_seed(0)
    model = build(preset, **{**run.model.to_dict(), "num_classes": len(train_set.classes)})
    return Trainer(model.train(), train_set, val_set, run, DEVICE)


def measure(trainer: Trainer, saves: int) -> dict[str, list]:
    """Seconds of steps: `calm`, at a `save`, and during `writing`, with one list per save."""
    batches = list(trainer.loader)
    samples: dict[str, list] = {"calm": [], "save": [], "writing": []}

    def step(save: CheckpointWriter | None = None) -> float:
        start = time.perf_counter()
        trainer.stepper([batches[trainer.position.step % len(batches)]], trainer.position.step)
        trainer.stepper.flush()
        trainer.position.step += 1
        if save:
            trainer.save(save)
        return time.perf_counter() - start

    with CheckpointWriter() as writer:
        for turn in range(saves + 1):
            saved, writing = step(writer), []
            while writer.is_writing:
                writing.append(step())
            if turn == 0:
                check(trainer, writer)
                continue
            samples["save"].append(saved)
            samples["writing"].append(writing)
            samples["calm"] += [step() for _ in range(CALM)]
    return samples


def check(trainer: Trainer, writer: CheckpointWriter) -> None:
    """Check that the file holds the weights bit for bit; a wrong file is not timed."""
    trainer.save(writer)
    writer.wait()
    weights = read_checkpoint(trainer.folder / LATEST)["model"]
    for name, value in trainer.model.state_dict().items():
        if not torch.equal(weights[name], value.cpu()):
            raise SystemExit(f"{name} in the file differs from the saved weights: a wrong file is not timed.")


def main(words: list[str]) -> None:
    """Measure, print, and write the raw samples."""
    parser = command("checkpoint", __doc__)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--saves", type=int, default=21)
    options = parser.parse_args(words)
    table = Table(title="training steps, ms: median (10-90 %), and ratio to calm steps")
    for column in ("preset", "MB", "calm", "at the save", "", "while it is written", "", "both", "steps"):
        table.add_column(column, justify="left" if column == "preset" else "right")
    results = []
    for preset in options.presets:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(preset, PRESETS[preset], folder)
            samples = measure(trainer, options.saves)
            size = (Path(folder) / LATEST).stat().st_size
        results.append({"preset": preset, **PRESETS[preset], "bytes": size, "seconds": _rounded(samples)})
        table.add_row(preset, f"{size / 1e6:.0f}", *row(samples))
    show(table)
    settings = {"saves": options.saves, "calm steps per save": CALM}
    say_written(write("checkpoint", {"settings": settings, "results": results}))


def row(samples: dict[str, list]) -> list[str]:
    """Cells: times, ratios of medians, and the number of steps during which a checkpoint is written."""
    calm = median(samples["calm"])
    writing = [seconds for during_save in samples["writing"] for seconds in during_save] or samples["calm"]
    both = [mean([saved, *during_save]) for saved, during_save in zip(samples["save"], samples["writing"], strict=True)]

    def cell(values: list[float]) -> str:
        low, high = spread(values)
        return f"{1e3 * median(values):.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})"

    def ratio(values: list[float]) -> str:
        return f"{median(values) / calm:.3f}"

    steps = mean(len(during_save) for during_save in samples["writing"])
    parts = [cell(samples["calm"]), cell(samples["save"]), ratio(samples["save"]), cell(writing), ratio(writing)]
    return [*parts, ratio(both), f"{steps:.1f}"]


def _rounded(samples: dict[str, list]) -> dict[str, list]:
    return {
        name: [
            [float(f"{s:.4g}") for s in value] if isinstance(value, list) else float(f"{value:.4g}") for value in values
        ]
        for name, values in samples.items()
    }
