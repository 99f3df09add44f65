"""Convergence of Conditional DETR and DETR on the same budget: AP against steps and seconds.

    python benchmarks/convergence.py --small             # two CPU cores, about 20 minutes
    python benchmarks/convergence.py --gpu               # one GPU: also a long DETR and the paper's ablations
    python benchmarks/convergence.py --small --at-most 1 # one more training, then stop

Backbone, width, data, loss (focal, also for DETR), optimizer, schedule and seeds are the same for all. Each model uses
the best of three learning rates, by AP50 at the end of the first seed's full trainings. Trainings run in parallel: on a
CPU one per core, so seconds are those of one thread, on a GPU those of a share of it. After each run the results are
saved in `runs/convergence/<plan>.json`. Called again after an interruption, the script runs the trainings that are
missing or failed; without that file it starts over. At its end it writes `results/paper/convergence-<plan>.json`, a
chart, and its part of `docs/paper.md`. The best weights of the first seed stay in `runs/convergence/<plan>`, one file
per rate. The images are synthetic shapes, drawn once for all trainings, or those of `--coco-path DIR`.

The small plan has 10 trainings of 2400 steps, two at a time: 18 minutes at 0.09 s per step without drawing and
evaluation; it took 23 minutes in all at 0.104 s. The plan for a GPU has 93,600 steps, four trainings at a time. The
longest has 19,200 steps and starts as soon as its rate is known: 8 minutes if each of the four makes 50 steps/s.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch.utils.data import Dataset

import conddetr
from conddetr.config.run import RunConfig, tiny_train_config
from conddetr.data.coco import coco_split
from conddetr.data.synthetic import SyntheticShapes
from conddetr.data.transforms import EvalTransform, TrainTransform
from conddetr.engine.checkpoint import BEST, read_checkpoint
from conddetr.engine.trainer import Trainer
from conddetr.interrupt import InterruptedRunError
from harness.command import command
from harness.machine import DEVICE, environment, is_null_gpu
from harness.show import console
from harness.store import RESULTS
from paper.convergence_report import DOCS, METRICS, compared, publish, rate_scores, table

KEPT = Path(__file__).parents[2] / "runs" / "convergence"
"""Per plan, a file of the finished trainings, and a folder of weights for `figure1.py`."""
GPU_PROCESSES = 4
"""Parallel trainings on one GPU: a step of such a small model does not fill it."""


@dataclass(frozen=True)
class Arm:
    """One model in the comparison."""

    name: str
    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)
    """Changed fields of the preset."""
    seeds: int = 3
    stretch: int = 1
    """Factor on the plan's epochs and schedule."""

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
    """The models to train, and their budget."""

    name: str
    arms: tuple[Arm, ...]
    epochs: int
    lr_drop: int
    rates: tuple[float, ...] = (1.5e-4, 7e-4, 1.5e-3)
    """Candidate learning rates of each family, ascending."""
    backend: str = "auto"
    coco_path: str = ""
    train_images: int = 1600
    """Synthetic images per epoch; no image repeats within the plan's epochs, after that all repeat."""
    val_images: int = 200
    batch_size: int = 8
    eval_every: int = 2


PLANS = {
    "small": Plan("small", PAIR, epochs=12, lr_drop=10),
    "gpu": Plan("gpu", PAIR + ABLATIONS, epochs=12, lr_drop=10),
}


@dataclass(frozen=True)
class Training:
    """One run of an arm, with a learning rate and a seed."""

    arm: Arm
    lr: float
    seed: int
    epochs: int

    @property
    def key(self) -> dict[str, Any]:
        """Its identity in the result file."""
        return {"arm": self.arm.name, "lr": self.lr, "seed": self.seed}


def first_trainings(plan: Plan) -> list[Training]:
    """Trainings that determine the learning rate of each family: its first arm, the first seed, every rate."""
    return [Training(arm, lr, 0, plan.epochs) for arm in _first_arms(plan) for lr in plan.rates]


def _first_arms(plan: Plan) -> list[Arm]:
    """The first arm of each family."""
    first = {arm.family: arm for arm in reversed(plan.arms)}
    return list(reversed(first.values()))


def chosen_rates(plan: Plan, runs: list[dict]) -> dict[str, float]:
    """Family → rate with the best final AP50 of the first trainings, for families whose first trainings are done."""
    rates = {}
    for arm in _first_arms(plan):
        scores = rate_scores(arm.name, runs)
        if len(scores) == len(plan.rates) and max(scores.values()) >= 0:
            rates[arm.family] = max(scores, key=scores.get)
    return rates


def trainings(plan: Plan, rates: dict[str, float]) -> list[Training]:
    """The runs to compare, for families whose rate is known. The longest come first, so that none runs alone at the
    end; then every arm once, then again with other seeds."""
    chosen = [
        Training(arm, rates[arm.family], seed, plan.epochs * arm.stretch)
        for seed in range(max(arm.seeds for arm in plan.arms))
        for arm in plan.arms
        if seed < arm.seeds and arm.family in rates
    ]
    return sorted(chosen, key=lambda training: -training.epochs)


def build(arm: Arm, num_classes: int, backend: str) -> conddetr.DETR:
    """The arm's model, with sigmoid logits, focal loss and the same class prior in both families.

    DETR is built with one class less, so that it has one logit per class: its no-object logit is the last class.
    """
    if arm.preset != DETR:
        return conddetr.build(arm.preset, num_classes=num_classes, backend=backend, **arm.overrides)
    model = conddetr.build(arm.preset, num_classes=num_classes - 1, backend=backend, **arm.overrides)
    torch.nn.init.constant_(model.class_embed.bias, -math.log((1 - 0.01) / 0.01))
    # From here on the configuration only determines loss and scores.
    model.config = conddetr.build(CONDITIONAL, num_classes=num_classes).config
    return model


class DrawnShapes(SyntheticShapes):
    """Synthetic shapes from the files of `draw_images`: drawing them in training would take a quarter of its time."""

    def __init__(self, length: int, seed: int, image_size: int, folder: Path) -> None:
        super().__init__(length, seed, image_size)
        self.pixels = np.load(folder / f"{seed}.npy", mmap_mode="r")
        self.objects = json.loads((folder / f"{seed}.json").read_text())

    def draw(self, index: int) -> tuple[np.ndarray, list[int], list[list[float]]]:
        """As in `SyntheticShapes`; after the last image the first follows again."""
        index %= len(self.objects)
        return self.pixels[index].copy(), *self.objects[index]


def shapes_of(plan: Plan) -> tuple[SyntheticShapes, SyntheticShapes]:
    """Training and validation images, not yet drawn."""
    size = conddetr.build(CONDITIONAL).config.image_size
    return SyntheticShapes(plan.train_images, 1, size), SyntheticShapes(plan.val_images, 2, size)


def draw_images(plan: Plan, folder: Path, each: Callable = map) -> None:
    """Write all synthetic images of a plan: `<seed>.npy` [images, S, S, 3] uint8, `<seed>.json` labels and boxes.

    Args:
        plan: of the images.
        folder: for the files.
        each: `map`, or a pool's `map`, whose processes share the work.
    """
    for shapes, count in zip(shapes_of(plan), (plan.train_images * plan.epochs, plan.val_images), strict=True):
        path = folder / f"{shapes.seed}.npy"
        np.lib.format.open_memmap(path, "w+", np.uint8, (count, shapes.image_size, shapes.image_size, 3))
        parts = [range(first, min(first + 400, count)) for first in range(0, count, 400)]
        objects = [entry for part in each(partial(_draw_part, shapes, path), parts) for entry in part]
        path.with_suffix(".json").write_text(json.dumps(objects))


def _draw_part(shapes: SyntheticShapes, path: Path, part: range) -> list[tuple[list[int], list[list[float]]]]:
    """Draw some images into the file, and return their labels and boxes."""
    pixels, objects = np.load(path, mmap_mode="r+"), []
    for index in part:
        pixels[index], labels, boxes = shapes.draw(index)
        objects.append((labels, boxes))
    return objects


def data_sets(plan: Plan, folder: Path) -> tuple[Dataset, Dataset]:
    """Training and validation images, the same for all; synthetic ones are read from the files of `draw_images`."""
    if plan.coco_path:
        config = conddetr.build(CONDITIONAL).config
        return (
            coco_split(plan.coco_path, "train", TrainTransform(config)),
            coco_split(plan.coco_path, "val", EvalTransform(config)),
        )
    return tuple(DrawnShapes(len(shapes), shapes.seed, shapes.image_size, folder) for shapes in shapes_of(plan))


@dataclass(frozen=True)
class Folders:
    """Folders that trainings read and write."""

    scratch: Path
    """Drawn images and output of trainings; removed at the end."""
    kept: Path
    """Weights that are kept."""


def train(plan: Plan, training: Training, folders: Folders, deadline: float = math.inf) -> dict[str, Any] | None:
    """One training, as an entry of the result file; None after the deadline, by `time.time`."""
    if time.time() > deadline:
        return None
    return {**training.key, "curve": learn(plan, training, folders), "environment": environment()}


def learn(plan: Plan, training: Training, folders: Folders) -> list[dict[str, float]]:
    """Train once; per epoch: step, seconds of training, mean loss, and AP and AP50 if evaluated."""
    train_set, val_set = data_sets(plan, folders.scratch)
    on_gpu = DEVICE.type == "cuda"
    config = tiny_train_config(
        epochs=training.epochs,
        batch_size=plan.batch_size,
        lr=training.lr,
        lr_backbone=training.lr,
        lr_drop=plan.lr_drop * training.arm.stretch,
        eval_every=plan.eval_every * training.arm.stretch,
        seed=training.seed,
        precision="bfloat16" if on_gpu else "float32",
        cuda_graphs=on_gpu,
        # Real images have many shapes and take time to load; a graph has one shape.
        pad_buckets=4 if on_gpu and plan.coco_path else 0,
        workers=2 if on_gpu and plan.coco_path else 0,
    )
    torch.manual_seed(training.seed)
    model = build(training.arm, len(train_set.classes), plan.backend)
    # Trainings run in parallel: their output would mix.
    with tempfile.TemporaryDirectory(dir=folders.scratch) as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        Trainer(model, train_set, val_set, RunConfig(output_dir=name, train=config), DEVICE).fit()
        if training.arm in PAIR and training.seed == 0:
            kept = folders.kept / f"{training.arm.preset}-{training.lr:g}.pt"
            keep(training.arm, train_set.classes, folder / BEST, kept)
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = len(train_set) // plan.batch_size
    curve, seconds = [], 0.0
    for record in records:
        seconds += steps * plan.batch_size / record["images_per_second"]
        point = {"step": steps * (record["epoch"] + 1), "seconds": round(seconds, 2), "loss": round(record["loss"], 4)}
        curve.append({**point, **{name: round(record[name], 4) for name in METRICS if name in record}})
    return curve


def keep(arm: Arm, classes: list[dict], best: Path, path: Path) -> None:
    """Save the best weights as a detector of the arm's preset, for `figure1.py`.

    A DETR then reads its last class as no object, see `build`: its boxes and attention are right, its scores are not.
    """
    classes = classes[: len(classes) - (arm.preset == DETR)]
    model = conddetr.build(arm.preset, num_classes=len(classes), **arm.overrides)
    model.load_state_dict(read_checkpoint(best)["model"])
    path.parent.mkdir(parents=True, exist_ok=True)
    conddetr.Detector(model, classes, "cpu").save(path)


def missing(wanted: Iterable[Training], runs: list[dict]) -> list[Training]:
    """Trainings that are not among the runs."""
    return [training for training in wanted if not any(training.key.items() <= run.items() for run in runs)]


def read(path: Path, plan: Plan) -> list[dict]:
    """Runs in a result file of the same plan, without failed ones; empty if there is no file.

    Raises:
        SystemExit: the file belongs to another plan.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["plan"] != json.loads(json.dumps(asdict(plan))):
        raise SystemExit(f"{path} belongs to another plan: move or delete it to start over.")
    return [run for run in content["runs"] if "failed" not in run]


def write(path: Path, plan: Plan, runs: list[dict]) -> None:
    """Write all runs. The file is replaced as a whole, so it is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(run, ensure_ascii=False) for run in runs)
    partial = path.with_suffix(".part")
    partial.write_text(f'{{\n "plan": {json.dumps(asdict(plan))},\n "runs": [\n  {lines}\n ]\n}}\n')
    partial.replace(path)


def train_missing(path: Path, plan: Plan, runs: list[dict], at_most: int | None, deadline: float, kept: Path) -> None:
    """Train what `runs` lacks, first the trainings that determine the rates, and add results to `runs` and the file.

    A failed training is recorded as failed, and the others continue. Ctrl-C and SIGTERM end all processes; finished
    trainings are in the file.

    Raises:
        SystemExit: the process of a training was killed.
    """
    if not missing(first_trainings(plan), runs) and not missing(trainings(plan, chosen_rates(plan, runs)), runs):
        return
    # A small model gains little from threads: each training has one, and uses one core.
    workers = GPU_PROCESSES if DEVICE.type == "cuda" else os.cpu_count()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(workers, context, _start_worker) as pool:
        submit = partial(_train_all, pool, Folders(Path(scratch), kept), path, plan, runs, deadline)
        try:
            if not plan.coco_path:
                draw_images(plan, Path(scratch), pool.map)
            todo = missing(first_trainings(plan), runs)[:at_most]
            submit(todo)
            at_most = None if at_most is None else at_most - len(todo)
            submit(missing(trainings(plan, chosen_rates(plan, runs)), runs)[:at_most])
        except BrokenProcessPool as error:
            raise SystemExit(
                f"The process of a training was killed (out of memory?). {path} has the others: run again."
            ) from error
        except BaseException:
            # Otherwise leaving the pool would wait for trainings whose results are lost.
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _start_worker() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes of a terminal; the main process ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _train_all(
    pool: Executor,
    folders: Folders,
    path: Path,
    plan: Plan,
    runs: list[dict],
    deadline: float,
    todo: list[Training],
) -> None:
    futures = {pool.submit(train, plan, training, folders, deadline): training for training in todo}
    for future in track(as_completed(futures), "training", total=len(futures), console=console):
        run = outcome(future, futures[future])
        if run is not None:
            runs.append(run)
            write(path, plan, runs)
            console.print(line_of(run), highlight=False)


def outcome(future: Future, training: Training) -> dict[str, Any] | None:
    """Result of a training, or `failed` with the reason.

    Raises:
        BrokenProcessPool, InterruptedRunError: its process was ended, which is no failure of the training.
    """
    error = future.exception()
    if error is None or isinstance(error, (BrokenProcessPool, InterruptedRunError)):
        return future.result()
    return {**training.key, "failed": f"{type(error).__name__}: {error}"}


def line_of(run: dict) -> str:
    """A run in one line."""
    name = f"{run['arm']}, learning rate {run['lr']:g}, seed {run['seed']}: "
    if "failed" in run:
        return name + f"failed, {run['failed']}"
    last = run["curve"][-1]
    name += f"step {last['step']}, {last['seconds']:.0f} s, loss {last['loss']:.2f}, "
    return name + f"AP {100 * last['AP']:.1f}, AP50 {100 * last['AP50']:.1f}"


def main(words: list[str]) -> None:
    """Train what is missing, then write tables and charts."""
    parser = command("convergence", __doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--small", dest="plan", action="store_const", const="small", help="two CPU cores")
    which.add_argument("--gpu", dest="plan", action="store_const", const="gpu", help="one GPU, with the ablations")
    parser.add_argument("--coco-path", default="", metavar="DIR", help="COCO's 2017 layout instead of synthetic shapes")
    parser.add_argument("--at-most", type=int, default=0, metavar="N", help="stop after N trainings; 0: train all")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no training after this time")
    parser.add_argument("--docs", type=Path, default=DOCS, help="page with markers for the results")
    options = parser.parse_args(words)
    if options.plan == "gpu" and (DEVICE.type != "cuda" or is_null_gpu()):
        parser.error("--gpu needs an NVIDIA GPU")
    plan = replace(PLANS[options.plan], coco_path=options.coco_path)
    name = f"{plan.name}-coco" if plan.coco_path else plan.name
    path, results = KEPT / f"{name}.json", RESULTS / "paper" / f"convergence-{name}.json"
    runs = read(path, plan)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    train_missing(path, plan, runs, options.at_most or None, time.time() + options.seconds, KEPT / name)
    if compared(runs):
        console.print(table(runs))
        write(results, plan, runs)
        paths = ", ".join(map(str, [results, *publish(results, options.docs)]))
        console.print(f"wrote {paths}", highlight=False, soft_wrap=True)
