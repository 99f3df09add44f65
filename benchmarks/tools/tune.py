"""Search launch settings of the attention kernels at the model's widths, on this GPU; for developing, not for training.

    python benchmarks/run.py tune                  # all three kernels, a few minutes
    python benchmarks/run.py tune --kernels forward --seconds 60

Prints the fastest settings per kernel by the geometric mean over the problems, each relative to what ships today.
The winner goes by hand into the table in `kernels/attn/triton/launch.py`, once the ahead-of-time check shows no spill.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from math import exp, fsum, log, nan

import torch
import triton
from rich.progress import track
from rich.table import Table

from conddetr.kernels import drawn_probability, dropout_bits
from conddetr.kernels.attn import triton as kernels
from conddetr.kernels.attn.inputs import bits_shape
from harness.command import command
from harness.machine import DEVICE, is_null_gpu
from harness.refusals import OURS, refusing
from harness.show import console
from harness.store import say_written, write
from ops.attn import Problem

KERNELS = ("forward", "backward_query", "backward_key")


def candidates() -> Iterator[kernels.Tiles]:
    """Every setting worth a try, the likely ones first."""
    # Not 128 keys: the words of dropout's bits end at a whole tile of 64.
    for queries, keys, warps, stages in itertools.product((64, 128, 32), (64, 32, 16), (4, 8, 2), (2, 3, 1, 4)):
        yield kernels.Tiles(queries, keys, warps, stages)


def problems() -> list[Problem]:
    """What training is made of: both grids, padded, with dropout, in the dtype of mixed precision."""
    return [Problem(grid, 8, torch.bfloat16, 0.1, True, False) for grid in ("r50", "dc5")]


def call(problem: Problem, kernel: str) -> Callable[[kernels.Launch], object]:
    """What to time: one pass of a problem under given settings."""
    made = problem.make()
    content = (made.q_content, made.q_spatial, made.k_content, made.rows, made.columns, made.v)
    batch, queries, heads, _ = made.q_content.shape
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    keep = dropout_bits(seed, bits_shape(batch, heads, queries, made.v.shape[1]), problem.dropout, "eager")
    inputs = kernels.Inputs(*content, made.valid_cells, None, keep, 0.125, drawn_probability(problem.dropout))
    out, lse = kernels.forward(inputs)
    if kernel == "forward":
        return lambda launch: kernels.forward(inputs, launch)
    return lambda launch: kernels.backward(inputs, out, out, lse, launch)


def search(
    kernel: str,
    runs: list[Callable],
    tiles: list[kernels.Tiles],
    shipped: kernels.Launch,
    clock: Callable,
    until: float,
) -> dict[kernels.Tiles, list[float]]:
    """Seconds on each problem by setting; those that do not fit the device, or fail, are left out and listed.

    Args:
        kernel: one of `KERNELS`; the settings of the others stay as shipped.
        runs: as `call` makes them.
        tiles: what to try, in this order, until the time is up.
        shipped: today's settings, always measured.
        clock: function → its seconds.
        until: `time.monotonic()` at which to stop.
    """
    found: dict[kernels.Tiles, list[float]] = {}
    refused: dict[str, str] = {}
    today = getattr(shipped, kernel)
    for one in track([today, *(tile for tile in tiles if tile != today)], description=kernel, console=console):
        if found and time.monotonic() > until:
            break
        launch = replace(shipped, **{kernel: one})
        with refusing(str(one), refused):
            found[one] = [clock(lambda run=run, launch=launch: run(launch)) for run in runs]
    for name, reason in refused.items():
        console.print(f"  {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if refused and today not in found:
        raise RuntimeError(f"{kernel}: {refused[str(today)]}, with what ships")
    return found


def report(kernel: str, found: dict[kernels.Tiles, list[float]]) -> None:
    """The ten fastest, relative to the first, which is what ships."""
    if is_null_gpu():
        console.print(f"{kernel}: {len(found)} settings go through; no durations: null GPU")
        return
    today = next(iter(found.values()))
    mean = {tile: exp(fsum(log(a / b) for a, b in zip(today, s, strict=True)) / len(s)) for tile, s in found.items()}
    table = Table(title=f"{kernel}: {len(found)} settings")
    for column in (*(field.name for field in fields(kernels.Tiles)), "speed-up", "milliseconds"):
        table.add_column(column, justify="right")
    for tile in sorted(mean, key=mean.get, reverse=True)[:10]:
        milliseconds = "  ".join(f"{1e3 * value:.4f}" for value in found[tile])
        table.add_row(*map(str, asdict(tile).values()), f"{mean[tile]:.2f}×", milliseconds)
    console.print(table)


def device_seconds(run: Callable[[], object]) -> float:
    """Of one call, the median of many; of none on a null GPU, where one call tells all there is."""
    if is_null_gpu():
        run()
        return nan
    return 1e-3 * triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def main(words: list[str]) -> None:
    """Search every kernel asked for; one result file for all. One that fails with what ships is told at the end."""
    parser = command("tune", __doc__)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--seconds", type=float, default=90.0, help="per kernel, compilation included")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs an NVIDIA GPU: there is none here.")
    major, minor = torch.cuda.get_device_capability()
    shipped = kernels.launch_settings(10 * major + minor, "half", 32)
    results, failed = {}, {}
    for kernel in options.kernels:
        with refusing(f"{OURS}, {kernel}", failed):
            runs = [call(problem, kernel) for problem in problems()]
            until = time.monotonic() + options.seconds
            found = search(kernel, runs, list(candidates()), shipped, device_seconds, until)
            report(kernel, found)
            results[kernel] = [{**asdict(tile), "seconds": seconds} for tile, seconds in found.items()]
    say_written(write("tune", {"seconds": options.seconds, "kernels": results}))
    if failed:
        raise SystemExit("\n".join(failed.values()))
