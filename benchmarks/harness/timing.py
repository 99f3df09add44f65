"""What every benchmark shares: checked results, interleaved timing, tables and result files.

On a null GPU, which computes nothing, benchmarks go through all their steps: no number is compared, no duration is
printed, and no file is written.
"""

import argparse
import json
import math
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harness.machine import DEVICE, Run, clock, device_name, environment, is_null_gpu, without_tf32
from harness.refusals import OURS, PROBLEM, UNCHECKED, WRONG, RefusedError, is_failure, refusing

RESULTS = Path(__file__).parents[1] / "results"
WARMUP = 2
NOT_COMPARED = "numbers not compared: null GPU"
console = Console(width=max(110, Console().width))
"""Wide enough for every column: on a narrower terminal lines wrap, figures are not lost."""


@dataclass(frozen=True)
class Work:
    """The least that a problem needs, padding not counted; what rates and floors are computed from."""

    flops: float
    """Multiplications and additions of the matrix products as the paper writes them: what TFLOP/s counts."""
    bytes: float
    """Every input read once, every output written once."""
    floors: dict[str, float]
    """Resource → seconds that it needs at the least; the largest is the floor."""

    @property
    def floor(self) -> float:
        """Seconds under which no implementation can come."""
        return max(self.floors.values())


@dataclass(frozen=True)
class Result:
    """One problem, with all that was measured of it."""

    title: str
    seconds: dict[str, list[float]]
    """Implementation → one sample per call."""
    work: Work | None = None
    peak_extra_bytes: dict[str, int] = field(default_factory=dict)
    """Implementation → device memory at its highest, less what was there before the call; empty on a CPU."""
    refused: dict[str, str] = field(default_factory=dict)
    """Implementation → why it was not timed."""
    images: int = 0
    """In each call, where a call is a step of a whole model; 0: it is not."""
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Implementation → part of a step → seconds, measured apart from `seconds`."""
    captured: list[str] = field(default_factory=list)
    """Implementations whose calls replay a CUDA graph: their memory is that of the capture, which a replay reuses."""


def arguments(description: str, seconds: float) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=50 if DEVICE.type == "cuda" else 10, help="timed calls of each")
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help=f"no new problem is begun after this while, the most important come first; default {seconds:.0f}",
    )
    parser.add_argument("--cudagraph", action="store_true", help="time replays of CUDA graphs: no launch overhead")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given; an error for one that this machine does not have."""
    options = parser.parse_args()
    if options.cudagraph and DEVICE.type != "cuda":
        parser.error("--cudagraph needs an NVIDIA GPU")
    return options


def usable(
    runs: dict[str, Run],
    answer: Callable[[Run], dict[str, Tensor]],
    exact: dict[str, Tensor],
    is_random: bool,
    peer_factor: float = 10,
) -> tuple[dict[str, Run], dict[str, str]]:
    """Run each once: those that compute the right thing, and the reason against each that does not.

    Right is an error of at most twice that of plain PyTorch for ours, `peer_factor` times for a peer: that it computes
    something else would show by far more, and how well it rounds is not asked here. Where plain PyTorch itself fails,
    nothing is right.

    Args:
        runs: implementation → call; the first is plain PyTorch, which sets the error budget.
        answer: call → its outputs and gradients by name.
        exact: the same in float64, without dropout.
        is_random: dropout is on. No two answers are then equal, but their mean squares of error must be.
        peer_factor: how many times the error of plain PyTorch a peer may have.
    """
    good, refused, budget = {}, {}, {}
    reference = next(iter(runs))
    for name, run in runs.items():
        with warnings.catch_warnings(record=True) as raised, refusing(name, refused, raised=raised):
            warnings.simplefilter("always")
            found = answer(run)
            errors = {key: _error(found[key], exact[key]) for key in exact}
            if name == reference:
                budget = errors
            elif reference in refused:
                raise RefusedError(f"{UNCHECKED}{reference}, which it is held to, is refused")
            factor = 2 if name.startswith(OURS) else peer_factor
            for key, error in errors.items():
                floor = 4 * torch.finfo(found[key].dtype).eps * exact[key].abs().max().item()
                limit = factor * budget[key] + floor
                is_right = _is_dropout(error, budget[key]) if is_random else error <= limit
                if not (is_right or is_null_gpu()):
                    raise RefusedError(f"{WRONG}error of {key} {error:.2e}, {reference} {budget[key]:.2e}")
            good[name] = run
    return good, refused


def _error(found: Tensor, exact: Tensor) -> float:
    """Root mean square: which of two largest errors is twice the other is chance."""
    return (found.detach().double() - exact).square().mean().sqrt().item()


def _is_dropout(error: float, budget: float) -> bool:
    return 0.8 * budget <= error <= 1.25 * budget


def measure(
    title: str, runs: dict[str, Run], options: argparse.Namespace, work: Work | None, refused: dict[str, str]
) -> Result:
    """Time all implementations of one problem, in turn within each round, so that drift hits all alike.

    Args:
        title: of the problem.
        runs: implementation → what to time.
        options: `rounds` calls of each (fewer where they take more than 20 s in all, but 5), `cudagraph`.
        work: of the problem.
        refused: implementations not among `runs`, with the reason. Those that fail now join them.
    """
    refused, peak = dict(refused), {}
    if options.cudagraph:
        runs, peak = _captured(runs, refused)
    elif DEVICE.type == "cuda":
        peak = _peaks(runs, refused)
        runs = {name: runs[name] for name in peak}
    timed = clock()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    started = time.monotonic()
    turns = range(1 if is_null_gpu() else WARMUP + options.rounds)
    for turn in track(turns, description=title, console=console, transient=True):
        if turn >= WARMUP + 5 and time.monotonic() - started > 20:
            break
        for name in list(seconds):
            with refusing(name, refused):
                value = timed(runs[name])
                if turn >= WARMUP:
                    seconds[name].append(value)
            if name in refused:
                del seconds[name]
    peak = {name: peak[name] for name in seconds if name in peak}
    return Result(title, seconds, work, peak, refused, captured=list(seconds) if options.cudagraph else [])


def _captured(runs: dict[str, Run], refused: dict[str, str]) -> tuple[dict[str, Run], dict[str, int]]:
    """Replays of CUDA graphs, and the memory of each capture; those that cannot be captured go to `refused`."""
    replays, peaks = {}, {}
    for name, run in runs.items():
        with refusing(name, refused, because="no CUDA graph: "):
            with torch.cuda.stream(torch.cuda.Stream()):
                run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                peak = allocated_by(run)
            replays[name], peaks[name] = graph.replay, peak
    return replays, peaks


def _peaks(runs: dict[str, Run], refused: dict[str, str]) -> dict[str, int]:
    """Memory of each; those that fail, or run out of it, go to `refused`."""
    peaks = {}
    for name, run in runs.items():
        with refusing(name, refused):
            peaks[name] = _peak_extra_bytes(run)
    return peaks


def _peak_extra_bytes(run: Run) -> int:
    """Of the second call: the first may compile, or keep something for good."""
    run()
    torch.cuda.synchronize()
    peak = allocated_by(run)
    torch.cuda.synchronize()
    return peak


def allocated_by(run: Run) -> int:
    """Bytes of device memory at their highest: the allocator counts while the host queues a call, or captures it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def with_host_memory(result: Result, runs: dict[str, Run]) -> Result:
    """The result, its memory filled in on a CPU."""
    if DEVICE.type == "cuda":
        return result
    return replace(result, peak_extra_bytes={name: _host_peak(runs[name]) for name in result.seconds})


def _host_peak(run: Run) -> int:
    """Bytes that PyTorch's allocator gave out during a call, at their highest."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    # Positive when given out, negative when given back.
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes, initial=0))


def run_all(name: str, runs: dict[str, Callable[[], Result]], options: argparse.Namespace) -> None:
    """Time problem after problem, print each, and keep the result file complete after each.

    Args:
        name: of the benchmark and, with the suffix of `--cudagraph`, of its file.
        runs: title → what gives its result; the most important first.
        options: of the command line; `seconds` is the time after which no problem is begun.

    Raises:
        SystemExit: one of ours is wrong or failed, or a whole problem; said when all else is measured and written.
    """
    name += "-cudagraph" * options.cudagraph
    results, titles, started = [], list(runs), time.monotonic()
    settings = {key: str(value) for key, value in vars(options).items()}
    with without_tf32():
        while titles and (not results or time.monotonic() - started < options.seconds):
            title = titles.pop(0)
            results.append(result_of(title, runs[title]))
            print_table(results[-1])
            path = write_results(name, settings, results, left_out=titles)
    if titles:
        console.print(f"{len(titles)} problems left out after {options.seconds:.0f} s: --seconds gives more.")
    say_written(path, "; `python benchmarks/run.py report` draws it")
    if found := failures(results):
        raise SystemExit("\n".join(found))


def result_of(title: str, run: Callable[[], Result]) -> Result:
    """The result of one problem; where the problem itself fails, one without times that says why."""
    refused: dict[str, str] = {}
    with refusing(PROBLEM, refused):
        return run()
    return Result(title, {}, refused=refused)


def failures(results: list[Result]) -> list[str]:
    """One line for each of ours that is wrong or failed, and for each problem that failed as a whole."""
    return [
        f"{result.title}: {name}: {why}"
        for result in results
        for name, why in result.refused.items()
        if is_failure(name, why)
    ]


def run_losses(
    name: str,
    description: str,
    make: Callable[[int, torch.dtype], Any],
    run: Callable[[Any, argparse.Namespace], Result],
    dtypes: list[str],
) -> None:
    """The command line of an operation of the loss: problems by number of images and dtype, one result file for all.

    Args:
        name: as of `run_all`.
        description: for `--help`.
        make: images and dtype → problem, which has a `title`.
        run: problem and options → its result.
        dtypes: by default.
    """
    parser = arguments(description, seconds=60)
    parser.add_argument("--images", nargs="+", type=int, default=[16, 2] if DEVICE.type == "cuda" else [2, 8])
    parser.add_argument("--dtypes", nargs="+", default=dtypes)
    options = parse(parser)
    problems = [make(images, getattr(torch, dtype)) for images, dtype in product(options.images, options.dtypes)]
    run_all(name, {problem.title: partial(run, problem, options) for problem in problems}, options)


def say_written(path: Path | None, what_next: str = "") -> None:
    """What `write` did, in one line."""
    said = "wrote no result file: null GPU" if path is None else f"wrote {path}{what_next}"
    console.print(said, highlight=False, soft_wrap=True)


def write_results(name: str, settings: dict[str, str], results: list[Result], left_out: list[str]) -> Path | None:
    """All samples, to four digits, with what `write` adds."""
    entries = []
    for result in results:
        rounded = {name: [float(f"{s:.4g}") for s in values] for name, values in result.seconds.items()}
        entries.append({**asdict(result), "seconds": rounded})
    return write(name, {"settings": settings, "left_out": left_out, "results": entries})


def write(name: str, content: dict) -> Path | None:
    """The content below the environment, as `results/<device>/<name>.json`; on a null GPU nothing, and None."""
    if is_null_gpu():
        return None
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), **content}, indent=1, ensure_ascii=False)
    # One line per list of samples, not per sample.
    text = re.sub(r"\[[^][{}\"]*\]", lambda found: " ".join(found[0].split()), text)
    path = folder / f"{name}.json"
    path.with_suffix(".part").write_text(text + "\n")
    return path.with_suffix(".part").replace(path)


def read_results(path: Path) -> list[Result]:
    """The results of a file of `write_results`."""
    entries = json.loads(path.read_text())["results"]
    return [Result(**{**entry, "work": entry["work"] and Work(**entry["work"])}) for entry in entries]


def rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: time with spread, speed-up over the best peer, rates, memory, multiple of the floor.

    "of peak": the matrix products that are needed, in this time, as a share of what the device's units can do.
    """
    headings = ["implementation", "ms", "10–90 %", "vs best peer"]
    if result.work:
        headings += ["TFLOP/s"] * (result.work.flops > 0) + ["GB/s"] * (result.work.bytes > 0)
    headings += ["images/s"] * (result.images > 0)
    headings += ["extra MiB"] * bool(result.peak_extra_bytes) + ["× floor"] * bool(result.work)
    has_products = bool(result.work) and "products" in result.work.floors
    headings += ["of peak"] * has_products
    peers = [median(values) for name, values in result.seconds.items() if not name.startswith(OURS)]
    best = min(peers, default=math.nan)
    lines = []
    for name, values in result.seconds.items():
        middle, (low, high) = median(values), spread(values)
        line = [name, milliseconds(middle), f"{milliseconds(low)}–{milliseconds(high)}", f"{best / middle:.2f}"]
        if result.work:
            line += [f"{1e-12 * result.work.flops / middle:.3g}"] * (result.work.flops > 0)
            line += [f"{1e-9 * result.work.bytes / middle:.3g}"] * (result.work.bytes > 0)
        if result.images:
            line.append(f"{result.images / middle:.3g}")
        if result.peak_extra_bytes:
            line.append(extra_mib(result, name))
        if result.work:
            line.append(f"{middle / result.work.floor:.2f}")
        if has_products:
            line.append(f"{result.work.floors['products'] / middle:.0%}")
        lines.append(line)
    return headings, lines


def extra_mib(result: Result, name: str) -> str:
    """Memory of an implementation, and of which moment it is."""
    if name not in result.peak_extra_bytes:
        return "–"
    return f"{result.peak_extra_bytes[name] / 2**20:.1f}{' at capture' if name in result.captured else ''}"


def milliseconds(seconds: float) -> str:
    """Four digits, without an exponent."""
    return f"{1e3 * seconds:.0f}" if seconds >= 1 else f"{1e3 * seconds:.4g}"


def spread(values: list[float]) -> tuple[float, float]:
    """The 10th and 90th percentile."""
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
    return low.item(), high.item()


def floors_line(work: Work) -> str:
    """The floors in one line, the largest first."""
    floors = sorted(work.floors.items(), key=lambda item: -item[1])
    return "floor: " + ", ".join(f"{resource} {1e3 * seconds:.3g} ms" for resource, seconds in floors)


def part_rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: milliseconds of each part of a step."""
    names = list(next(iter(result.parts.values())))
    lines = [[name, *(milliseconds(parts[part]) for part in names)] for name, parts in result.parts.items()]
    return ["implementation", *names], lines


def parts_table(result: Result) -> Table:
    """`part_rows` for the terminal."""
    return _table(*part_rows(result), "where the time goes, ms")


def print_table(result: Result) -> None:
    """One problem in the terminal."""
    if is_null_gpu():
        console.print(_counted_table(result))
        console.print(NOT_COMPARED)
    else:
        headings, lines = rows(result)
        console.print(_table(headings, lines, result.title, result.work and floors_line(result.work)))
        if result.parts:
            console.print(parts_table(result))
    for name, why in result.refused.items():
        console.print(f"  {name}: {why}", highlight=False, markup=False, soft_wrap=True)


def _counted_table(result: Result) -> Table:
    """What a null GPU can tell: which implementations go through, and how much memory they take."""
    headings, lines = ["goes through"], [[name] for name in result.seconds]
    if result.peak_extra_bytes:
        headings.append("extra MiB, counted")
        lines = [[name, extra_mib(result, name)] for name in result.seconds]
    return _table(headings, lines, result.title)


def _table(headings: list[str], lines: list[list[str]], title: str, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def show(table: Table) -> None:
    """Print a table of durations, where they are any."""
    console.print("no durations: null GPU" if is_null_gpu() else table)
