"""Time and memory of attention, of whole training steps and of reading annotations, by problem size.

    python benchmarks/run.py scaling               # keys from 10² to 10⁵, queries, batch; training steps; boxes
    python benchmarks/run.py scaling --backward    # attention with its gradients

One of keys, queries and batch varies, the others are those of R50 at 800×1066. Implementations are those of
`ops/attn.py` that need no compilation per size, checked before timed. Annotation files are those of `annotations.py`,
up to the size of COCO's training set. Writes results/<device>/scaling.json and, from it, scaling.png.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import median

import matplotlib

from models import annotations
from ops import attn

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import conddetr
from harness.benchmark import arguments, failures, parse, result_of
from harness.check import usable
from harness.machine import DEVICE, without_tf32
from harness.memory import with_host_memory
from harness.rates import product_rate
from harness.result import Result, Work
from harness.show import console, print_table
from harness.store import say_written, write
from harness.timing import measure
from models import train
from paper import tables

SQUARES = {f"{side}×{side}": (side, side) for side in (10, 18, 32, 56, 100, 178, 316)}
attn.GRIDS.update(SQUARES)
QUERIES = (10, 30, 100, 300, 1000, 3000)
BATCHES = (1, 2, 4, 8, 16)
COMPILED = ("torch.compile of it", "FlexAttention", "FlexAttention, FLASH")
"""Left out: recompiling them for each size takes minutes, none of which is measured."""
STEP_PRESET = "conditional-detr-r50" if DEVICE.type == "cuda" else "conditional-detr-tiny"
STEP_QUERIES = conddetr.build(STEP_PRESET).config.num_queries
SIDE, STRIDE = (800, 32) if DEVICE.type == "cuda" else (128, 16)
"""Side of the step's images, and pixels per key of its feature map."""
ANNOTATION_ROUNDS = 2
"""Few, because the plain reader needs twenty seconds for a file of COCO's size."""


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
    runs = {name: run for name, run in problem.implementations(tensors).items() if name not in COMPILED}
    good, refused = usable(runs, problem.answer, problem.exact(tensors), is_random=False)
    return with_host_memory(measure(problem.title, good, options, problem.work(), refused), good)


def training_step(options: argparse.Namespace, batch: int = 1, side: int = SIDE, queries: int = STEP_QUERIES) -> Result:
    """A whole step, with clipping and update, of our model and of the official-style loop, on square noise images.

    The floor counts products: a backward pass has twice those of the forward pass.
    """
    problem = train.Problem(STEP_PRESET, batch, (side, side), torch.float32)
    images = problem.make()
    models = {
        name: step_model(backend, queries).to(DEVICE) for name, backend in (("official", "eager"), ("ours", "auto"))
    }
    losses = partial(train.our_losses, models["official"], problem, images)
    runs = {
        "official-style eager": train.plain(models["official"], losses, looks=True, fused=False).step,
        "ours, auto": train.ours(models["ours"], problem, images, "without CUDA graphs").step,
    }
    with FakeTensorMode():
        model = step_model("eager", queries)
        flops = 3 * 2e9 * tables.count(lambda: model(torch.empty(batch, 3, side, side)))
    work = Work(flops, 0, {"products": flops / product_rate(torch.float32)})
    title = f"{problem.title}, {queries} queries"
    return with_host_memory(measure(title, runs, options, work, {}), runs)


def step_model(backend: str, queries: int) -> conddetr.DETR:
    """The step's model, with the same weights for every backend."""
    torch.manual_seed(0)
    return conddetr.build(STEP_PRESET, backend=backend, num_queries=queries)


def memory_floor(problem: attn.Problem) -> int:
    """Bytes that attention must allocate: its output, and with backward the gradients of its separable inputs."""
    height, width = attn.GRIDS[problem.grid]
    rows = problem.queries
    if problem.backward:
        rows += 2 * problem.queries + 2 * height * width + height + width
    return problem.batch * rows * attn.HEADS * attn.WIDTH * problem.dtype.itemsize


def draw(path: Path) -> Path:
    """Plot time above and memory below, a column per axis, with dashed floors."""
    content = json.loads(path.read_text())
    entries = content["results"]
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
        bounds = [(row["value"], row["memory_floor"] / 2**20) for row in rows if row["memory_floor"]]
        if bounds:
            below.plot(*zip(*bounds, strict=True), "k--", linewidth=1, label="floor")
        if floors:
            above.plot(*zip(*floors, strict=True), "k--", linewidth=1, label="floor")
        for panel, label in ((above, "milliseconds, median"), (below, "peak extra memory, MiB")):
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
            panel.grid(alpha=0.3, which="both")
        above.legend(fontsize=7)
    if content["left_out"]:
        figure.supxlabel(f"left out: {', '.join(content['left_out'])}", fontsize=7, wrap=True)
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return target


@dataclass(frozen=True)
class Size:
    """One point of the chart."""

    axis: str
    value: int
    run: Callable[[], Result]
    memory_floor: int = 0
    """Bytes; 0: unknown."""

    @property
    def title(self) -> str:
        """Name in the list of sizes that were left out."""
        return f"{self.axis} {self.value}"


def sizes_of(options: argparse.Namespace) -> list[Size]:
    """All sizes, the small ones of every axis first."""
    axes = [
        [
            Size(axis, value, partial(attention, problem, options), memory_floor(problem))
            for value, problem in by_value.items()
        ]
        for axis, by_value in problems(options.backward).items()
    ]
    step = partial(training_step, options)
    axes += [
        [Size("batch of a training step", batch, partial(step, batch=batch)) for batch in BATCHES],
        [Size("keys of a training step", (k * SIDE // STRIDE) ** 2, partial(step, side=k * SIDE)) for k in (1, 2, 4)],
        [Size("queries of a training step", queries, partial(step, queries=queries)) for queries in QUERIES],
        [
            Size("boxes of an annotation file", boxes, partial(annotations.measured, boxes, ANNOTATION_ROUNDS))
            for boxes in annotations.SIZES
        ],
    ]
    return [size for same_rank in zip_longest(*axes) for size in same_rank if size is not None]


def entry(size: Size, result: Result) -> dict:
    """Entry of the result file; samples have four digits, as in other benchmarks."""
    seconds = {name: [float(f"{value:.4g}") for value in values] for name, values in result.seconds.items()}
    return {
        "axis": size.axis,
        "value": size.value,
        "memory_floor": size.memory_floor,
        **asdict(result),
        "seconds": seconds,
    }


def main(words: list[str]) -> None:
    """Measure, rewrite the file after each size, and plot; wrong answers are reported at the end."""
    parser = arguments("scaling", __doc__, seconds=300)
    parser.set_defaults(rounds=50 if DEVICE.type == "cuda" else 5)
    parser.add_argument("--backward", action="store_true", help="attention with its gradients")
    options = parse(parser, words)
    settings = {key: str(value) for key, value in vars(options).items()}
    name = "scaling" + "-backward" * options.backward + "-cudagraph" * options.cudagraph
    todo, entries, wrong, unmeasured, started = sizes_of(options), [], [], [], time.monotonic()
    while todo and (not entries or time.monotonic() - started < options.seconds):
        size = todo.pop(0)
        with without_tf32():
            result = result_of(size.title, size.run)
        print_table(result)
        wrong += failures([result])
        if not result.seconds:
            unmeasured.append(size.title)
            continue
        entries.append(entry(size, result))
        left_out = [*unmeasured, *(size.title for size in todo)]
        in_order = sorted(entries, key=lambda entry: (entry["axis"], entry["value"]))
        path = write(name, {"settings": settings, "left_out": left_out, "wrong": wrong, "results": in_order})
    if not entries:
        raise SystemExit(f"nothing was measured: {wrong}")
    if todo:
        console.print(f"left out after {options.seconds:.0f} s: {', '.join(size.title for size in todo)}")
    say_written(path, path and f" and {draw(path)}")
    if wrong:
        raise SystemExit("\n".join(wrong))
