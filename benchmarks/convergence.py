"""How fast Conditional DETR and DETR learn under one budget: AP against steps and against seconds.

    python benchmarks/convergence.py --small             # two CPU cores, under 20 minutes
    python benchmarks/convergence.py --gpu               # one GPU: also a long DETR and the paper's ablations
    python benchmarks/convergence.py --small --at-most 1 # one more training, then stop

Backbone, width, data, loss (focal, also for DETR), optimiser, schedule and seeds are the same for all; each gets the
best of five learning rates, by the training loss at the end of short runs. On a CPU trainings run side by side, one
per core, so seconds are those of one thread. What is trained is kept after each run in
`results/paper/convergence-<plan>.json`: called again, the script goes on with what is missing. The images are the
synthetic shapes, or those of `--coco-path DIR`.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from harness import RESULTS, console
from machine import DEVICE, environment
from rich.progress import track
from rich.table import Table
from torch.utils.data import Dataset

import conddetr
from conddetr.data.coco import coco_split
from conddetr.data.synthetic import SyntheticShapes
from conddetr.data.transforms import EvalTransform, TrainTransform
from conddetr.engine.config import RunConfig, tiny_train_config
from conddetr.engine.trainer import Trainer

RATES = (7e-5, 1.5e-4, 3e-4, 7e-4, 1.5e-3)
"""Learning rates among which each family's is chosen."""
METRICS = ("AP", "AP50")


@dataclass(frozen=True)
class Arm:
    """One model in the comparison."""

    name: str
    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)
    """Of the preset."""
    seeds: int = 3
    stretch: int = 1
    """Times the plan's epochs, with the schedule stretched likewise."""

    @property
    def family(self) -> str:
        """Arms of a family share the learning rate."""
        return self.preset


CONDITIONAL, DETR = "conditional-detr-tiny", "detr-tiny"
PAIR = (Arm("Conditional DETR", CONDITIONAL), Arm("DETR", DETR))
ABLATIONS = (
    Arm("DETR, 8 times as long", DETR, seeds=1, stretch=8),
    *(Arm(f"CSQ-{form}", CONDITIONAL, {"csq": form}) for form in "CTPI"),
    *(Arm(f"reference points {kind}", CONDITIONAL, {"reference_points": kind}) for kind in ("learned", "zero")),
    Arm("DETR, positions in the first layer only", DETR, {"cross_attention_positions": "first-layer"}),
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    name: str
    arms: tuple[Arm, ...]
    epochs: int
    lr_drop: int
    probe_epochs: int
    backend: str
    coco_path: str = ""
    train_images: int = 1600
    """Synthetic images per epoch; never one twice."""
    val_images: int = 200
    batch_size: int = 8
    eval_every: int = 2


PLANS = {
    "small": Plan("small", PAIR, epochs=12, lr_drop=10, probe_epochs=2, backend="eager"),
    "gpu": Plan("gpu", PAIR + ABLATIONS, epochs=12, lr_drop=10, probe_epochs=2, backend="auto"),
}


@dataclass(frozen=True)
class Training:
    """One run: of an arm, with a learning rate and a seed."""

    arm: Arm
    lr: float
    seed: int
    epochs: int
    is_probe: bool

    @property
    def key(self) -> dict[str, Any]:
        """What names it in the result file."""
        return {"arm": self.arm.name, "lr": self.lr, "seed": self.seed, "probe": self.is_probe}


def probes(plan: Plan) -> list[Training]:
    """Short runs that decide the learning rate of each family: its first arm, every rate."""
    first = {arm.family: arm for arm in reversed(plan.arms)}
    return [Training(arm, lr, 0, plan.probe_epochs, True) for arm in reversed(first.values()) for lr in RATES]


def chosen_rates(plan: Plan, runs: list[dict]) -> dict[str, float]:
    """The rate with the least training loss at the end of the short runs, of families whose short runs are done."""
    rates = {}
    for arm in plan.arms:
        losses = {run["lr"]: run["curve"][-1]["loss"] for run in runs if run["probe"] and run["arm"] == arm.name}
        if len(losses) == len(RATES):
            rates[arm.family] = min(losses, key=losses.get)
    return rates


def trainings(plan: Plan, rates: dict[str, float]) -> list[Training]:
    """The runs that are compared, of families whose rate is known; every arm once, then again with other seeds."""
    return [
        Training(arm, rates[arm.family], seed, plan.epochs * arm.stretch, False)
        for seed in range(max(arm.seeds for arm in plan.arms))
        for arm in plan.arms
        if seed < arm.seeds and arm.family in rates
    ]


def build(arm: Arm, num_classes: int, backend: str) -> conddetr.DETR:
    """The arm's model, with sigmoid logits, focal loss and the same prior of the classes in either family.

    A DETR of one class less has as many logits as classes here: its no-object logit serves as the last class.
    """
    if arm.preset != DETR:
        return conddetr.build(arm.preset, num_classes=num_classes, backend=backend, **arm.overrides)
    model = conddetr.build(arm.preset, num_classes=num_classes - 1, backend=backend, **arm.overrides)
    torch.nn.init.constant_(model.class_embed.bias, -math.log((1 - 0.01) / 0.01))
    focal = conddetr.build(CONDITIONAL, num_classes=num_classes).config
    # From here on the configuration decides about loss and scores alone.
    model.config = replace(focal, backend=backend)
    return model


def data_sets(plan: Plan) -> tuple[Dataset, Dataset]:
    """Training and validation images, the same for all."""
    config = conddetr.build(CONDITIONAL).config
    if plan.coco_path:
        return (
            coco_split(plan.coco_path, "train", TrainTransform(config)),
            coco_split(plan.coco_path, "val", EvalTransform(config)),
        )
    return (
        SyntheticShapes(plan.train_images, seed=1, image_size=config.image_size),
        SyntheticShapes(plan.val_images, seed=2, image_size=config.image_size),
    )


def train(plan: Plan, training: Training, deadline: float = math.inf) -> dict[str, Any] | None:
    """One training, as it stands in the result file; None where the deadline, by `time.time`, is over."""
    if time.time() > deadline:
        return None
    return {**training.key, "curve": learn(plan, training), "environment": environment()}


def learn(plan: Plan, training: Training) -> list[dict[str, float]]:
    """Train once; per epoch: step, seconds of training, mean loss, and AP and AP50 where evaluated."""
    train_set, val_set = data_sets(plan)
    config = tiny_train_config(
        epochs=training.epochs,
        batch_size=plan.batch_size,
        lr=training.lr,
        lr_backbone=training.lr,
        lr_drop=plan.lr_drop * training.arm.stretch,
        eval_every=training.epochs if training.is_probe else plan.eval_every * training.arm.stretch,
        seed=training.seed,
        precision="bfloat16" if DEVICE.type == "cuda" else "float32",
    )
    torch.manual_seed(training.seed)
    model = build(training.arm, len(train_set.classes), plan.backend)
    # Trainings run side by side: their lines would mix.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        Trainer(model, train_set, val_set, RunConfig(output_dir=folder, train=config), DEVICE).fit()
        records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    steps = len(train_set) // plan.batch_size
    curve, seconds = [], 0.0
    for record in records:
        seconds += steps * plan.batch_size / record["images_per_second"]
        point = {"step": steps * (record["epoch"] + 1), "seconds": round(seconds, 2), "loss": round(record["loss"], 4)}
        curve.append({**point, **{name: round(record[name], 4) for name in METRICS if name in record}})
    return curve


def missing(wanted: Iterable[Training], runs: list[dict]) -> list[Training]:
    """Those that are not among the runs."""
    return [training for training in wanted if not any(training.key.items() <= run.items() for run in runs)]


def read(path: Path, plan: Plan) -> list[dict]:
    """The runs in a result file of the same plan; none where there is no file."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["plan"] != json.loads(json.dumps(asdict(plan))):
        raise SystemExit(f"{path} is of another plan: move it away, or delete it, to begin anew.")
    return content["runs"]


def write(path: Path, plan: Plan, runs: list[dict]) -> None:
    """All runs; the file is complete or the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(run, ensure_ascii=False) for run in runs)
    partial = path.with_suffix(".part")
    partial.write_text(f'{{\n "plan": {json.dumps(asdict(plan))},\n "runs": [\n  {lines}\n ]\n}}\n')
    partial.replace(path)


def train_missing(path: Path, plan: Plan, runs: list[dict], at_most: int | None, deadline: float) -> None:
    """Train what `runs` lacks, the short runs first, and add it there and to the file."""
    # Threads of one small model wait for each other more than they help: one each, on as many cores as there are.
    workers = 1 if DEVICE.type == "cuda" else os.cpu_count()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        todo = missing(probes(plan), runs)[:at_most]
        _collect({pool.submit(train, plan, training, deadline) for training in todo}, path, plan, runs)
        at_most = None if at_most is None else at_most - len(todo)
        todo = missing(trainings(plan, chosen_rates(plan, runs)), runs)[:at_most]
        _collect({pool.submit(train, plan, training, deadline) for training in todo}, path, plan, runs)


def _collect(futures: set[Future], path: Path, plan: Plan, runs: list[dict]) -> None:
    for future in track(as_completed(futures), "training", total=len(futures), console=console):
        run = future.result()
        if run is not None:
            runs.append(run)
            write(path, plan, runs)
            last = run["curve"][-1]
            line = f"{run['arm']}, learning rate {run['lr']:g}, seed {run['seed']}: step {last['step']}, "
            line += f"loss {last['loss']:.2f}, AP {100 * last['AP']:.1f}, AP50 {100 * last['AP50']:.1f}"
            console.print(line, highlight=False)


def evaluated(run: dict) -> list[dict[str, float]]:
    """The points of a curve that have AP."""
    return [point for point in run["curve"] if "AP" in point]


def steps_to(runs: list[dict], metric: str, target: float) -> int | None:
    """The first evaluated step at which the mean over runs of a metric is at least a target; None: never."""
    for points in zip(*map(evaluated, runs), strict=True):
        if mean(point[metric] for point in points) >= target:
            return points[0]["step"]
    return None


def compared(runs: list[dict]) -> dict[str, list[dict]]:
    """Arm → its runs, the short ones left out."""
    arms: dict[str, list[dict]] = {}
    for run in runs:
        if not run["probe"]:
            arms.setdefault(run["arm"], []).append(run)
    return arms


def table(runs: list[dict]) -> Table:
    """Final AP of each arm, mean and range over seeds, and when the mean reached half of the best."""
    arms = compared(runs)
    best = max(mean(run["curve"][-1]["AP50"] for run in group) for group in arms.values())
    found = Table(title=f"percent, mean (least–greatest of the seeds); half of the best AP50: {50 * best:.1f}")
    for heading in ("model", "lr", "seeds", "steps", "seconds", *METRICS, "steps to half of the best AP50"):
        found.add_column(heading, justify="left" if heading == "model" else "right")
    for name, group in arms.items():
        last = [run["curve"][-1] for run in group]
        cells = []
        for metric in METRICS:
            values = [100 * point[metric] for point in last]
            cells.append(f"{mean(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        seconds = f"{mean(point['seconds'] for point in last):.0f}"
        reached = steps_to(group, "AP50", best / 2)
        counts = (str(len(group)), str(last[0]["step"]), seconds)
        found.add_row(name, f"{group[0]['lr']:g}", *counts, *cells, "never" if reached is None else str(reached))
    return found


def draw(path: Path, runs: list[dict]) -> Path:
    """AP and AP50 against steps and seconds: mean over seeds, the band from the least to the greatest."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharey="row", sharex="col")
    for row, metric in zip(axes, METRICS, strict=True):
        for axis, unit in zip(row, ("step", "seconds"), strict=True):
            for name, group in compared(runs).items():
                points = list(zip(*map(evaluated, group), strict=True))
                x = [mean(point[unit] for point in at) for at in points]
                y = [[100 * point[metric] for point in at] for at in points]
                line = axis.plot(x, [mean(values) for values in y], marker="o", markersize=3, label=name)
                band = [min(values) for values in y], [max(values) for values in y]
                axis.fill_between(x, *band, color=line[0].get_color(), alpha=0.2)
            axis.set_ylabel(f"{metric}, percent")
            axis.grid(alpha=0.3)
            axis.set_ylim(0, 100)
    axes[1, 0].set_xlabel("training steps")
    axes[1, 1].set_xlabel("seconds of training")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"{path.stem}: mean and range over seeds", fontsize=10)
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return target


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--small", dest="plan", action="store_const", const="small", help="two CPU cores")
    which.add_argument("--gpu", dest="plan", action="store_const", const="gpu", help="one GPU, with the ablations")
    parser.add_argument("--coco-path", default="", metavar="DIR", help="COCO's 2017 layout instead of synthetic shapes")
    parser.add_argument("--at-most", type=int, default=0, metavar="N", help="stop after N trainings; 0: train all")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no training after so long")
    options = parser.parse_args()
    if options.plan == "gpu" and DEVICE.type != "cuda":
        parser.error("--gpu needs an NVIDIA GPU")
    plan = replace(PLANS[options.plan], coco_path=options.coco_path)
    path = RESULTS / "paper" / f"convergence-{plan.name}{'-coco' if plan.coco_path else ''}.json"
    runs = read(path, plan)
    train_missing(path, plan, runs, options.at_most or None, time.time() + options.seconds)
    if compared(runs):
        console.print(table(runs))
        console.print(f"wrote {path} and {draw(path, runs)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
