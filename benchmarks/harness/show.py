"""Results in the terminal."""

import math
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from harness.machine import is_null_gpu
from harness.refusals import OURS
from harness.result import Result, Work

NOT_COMPARED = "numbers not compared: null GPU"
console = Console(width=max(110, Console().width))
"""Wide enough for every column: on a narrower terminal lines wrap, but no figure is cut off."""


def print_table(result: Result) -> None:
    """Print the tables and refusals of one problem."""
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


def rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: time with spread, speed-up over the best peer, rates, memory, multiple of the floor.

    "of peak": the rate of the necessary matrix products, as a share of the device's rate.
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
    """Memory of an implementation, with "at capture" if it was measured then."""
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


def _counted_table(result: Result) -> Table:
    """The results of a null GPU: which implementations run, and how much memory they allocate."""
    headings, lines = ["runs"], [[name] for name in result.seconds]
    if result.peak_extra_bytes:
        headings.append("extra MiB, counted")
        lines = [[name, extra_mib(result, name)] for name in result.seconds]
    return _table(headings, lines, result.title)


def _table(headings: list[str], lines: list[list[str]], title: str, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    for index, heading in enumerate(headings):
        # Names may take several lines, so that no figure is cut off.
        table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def show(table: Table) -> None:
    """Print a table of durations; on a null GPU, a line that there are none."""
    console.print("no durations: null GPU" if is_null_gpu() else table)
