"""Time and memory of conditional attention, and of a whole training step, against their size.

    python benchmarks/scaling.py                 # keys from 10² to 10⁵, queries, batch; the training step against batch
    python benchmarks/scaling.py --backward      # attention with its gradients

One of keys, queries and batch grows, the others are those of R50 at 800×1066. Implementations are those of `attn.py`
that need no compilation for each size, checked before timed. Writes results/<device>/scaling.json and, from it,
scaling.png.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import attn
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from harness import Result, arguments, console, measure, parse, print_table, usable, with_host_memory, write
from machine import DEVICE

import conddetr

SQUARES = {f"{side}×{side}": (side, side) for side in (10, 18, 32, 56, 100, 178, 316)}
attn.GRIDS.update(SQUARES)
QUERIES = (10, 30, 100, 300, 1000, 3000)
BATCHES = (1, 2, 4, 8, 16)
COMPILED = ("torch.compile of it", "FlexAttention")
"""Compiled anew for each size: minutes, of which none would be measured."""
STEP_PRESET = "conditional-detr-r50" if DEVICE.type == "cuda" else "conditional-detr-tiny"


def problems(backward: bool) -> dict[str, dict[int, attn.Problem]]:
    """Axis → value on it → problem, the smallest first."""

    def problem(grid: str = "r50", batch: int = 1, queries: int = attn.QUERIES) -> attn.Problem:
        return attn.Problem(grid, batch, torch.float32, 0.0, padded=False, backward=backward, queries=queries)

    return {
        "keys": {side * side: problem(grid) for grid, (side, _) in SQUARES.items()},
        "queries": {queries: problem(queries=queries) for queries in QUERIES},
        "batch": {batch: problem(batch=batch) for batch in BATCHES},
    }


def attention(problem: attn.Problem, options: argparse.Namespace) -> Result:
    """Check and time all implementations of one problem."""
    tensors = problem.make()
    runs = {name: run for name, run in attn.implementations(problem, tensors).items() if name not in COMPILED}
    good, refused = usable(runs, lambda call: attn.comparable(call()), attn.exact(tensors), is_random=False)
    return with_host_memory(measure(problem.title, good, options, problem.work(), refused), good)


def training_step(batch: int, options: argparse.Namespace) -> Result:
    """Forward, loss and backward of a whole model; every image of the preset's size, with two objects."""
    model = conddetr.build(STEP_PRESET, num_classes=3, backend="auto").to(DEVICE)
    criterion = conddetr.build_criterion(model.config).to(DEVICE)
    size = model.config.image_size
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.4, 0.4]])
    targets = [{"labels": torch.tensor([0, 1]), "boxes": boxes}] * batch

    def run() -> None:
        model.zero_grad(set_to_none=True)
        criterion(model(images), targets)["loss"].backward()

    runs = {"ours, auto": run}
    title = f"{STEP_PRESET}, training step, {batch}×3×{size}×{size}"
    return with_host_memory(measure(title, runs, options, None, {}), runs)


def draw(path: Path) -> Path:
    """Time above, memory below; a column per axis; floors dashed."""
    entries = json.loads(path.read_text())["results"]
    axes_names = list(dict.fromkeys(entry["axis"] for entry in entries))
    figure, grid = plt.subplots(2, len(axes_names), figsize=(4.2 * len(axes_names), 7), squeeze=False)
    for (above, below), axis in zip(grid.T, axes_names, strict=True):
        rows = [entry for entry in entries if entry["axis"] == axis]
        for name in dict.fromkeys(name for row in rows for name in row["seconds"]):
            timed = [(row["value"], 1e3 * median(row["seconds"][name])) for row in rows if name in row["seconds"]]
            above.plot(*zip(*timed, strict=True), marker="o", markersize=3, label=name)
            memory = [
                (row["value"], row["peak_extra_bytes"][name] / 2**20) for row in rows if name in row["peak_extra_bytes"]
            ]
            below.plot(*zip(*memory, strict=True), marker="o", markersize=3, label=name)
        floors = [(row["value"], 1e3 * max(row["work"]["floors"].values())) for row in rows if row["work"]]
        if floors:
            above.plot(*zip(*floors, strict=True), "k--", linewidth=1, label="floor")
        for panel, label in ((above, "milliseconds, median"), (below, "extra memory at its peak, MiB")):
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
            panel.grid(alpha=0.3, which="both")
        above.legend(fontsize=7)
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return target


def runs_of(options: argparse.Namespace) -> list[tuple[str, int, Callable[[], Result]]]:
    """Axis, value and measurement; every axis' small sizes before any axis' large ones."""
    axes = {
        axis: {value: partial(attention, problem, options) for value, problem in of_axis.items()}
        for axis, of_axis in problems(options.backward).items()
    }
    axes["batch of a training step"] = {batch: partial(training_step, batch, options) for batch in BATCHES}
    ranked = [(rank, axis, value, run) for axis, runs in axes.items() for rank, (value, run) in enumerate(runs.items())]
    return [entry[1:] for entry in sorted(ranked, key=lambda entry: entry[0])]


def main() -> None:
    """Measure, keep the file complete after each size, draw."""
    parser = arguments(__doc__.splitlines()[0], seconds=240)
    parser.set_defaults(rounds=50 if DEVICE.type == "cuda" else 5)
    parser.add_argument("--backward", action="store_true", help="attention with its gradients")
    options = parse(parser)
    settings = {key: str(value) for key, value in vars(options).items()}
    entries, started = [], time.monotonic()
    todo = runs_of(options)
    while todo and (not entries or time.monotonic() - started < options.seconds):
        axis, value, run = todo.pop(0)
        result = run()
        print_table(result)
        entries.append({"axis": axis, "value": value, **asdict(result)})
        left_out = [f"{axis} {value}" for axis, value, _ in todo]
        in_order = sorted(entries, key=lambda entry: (entry["axis"], entry["value"]))
        path = write(
            "scaling" + "-backward" * options.backward,
            {"settings": settings, "left_out": left_out, "results": in_order},
        )
    console.print(f"wrote {path} and {draw(path)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
