"""Search launch settings of the attention kernels at the model's widths on this GPU, for kernel development.

    python benchmarks/run.py tune                  # all three kernels, a few minutes
    python benchmarks/run.py tune --kernels forward --seconds 60

Prints the fastest settings per kernel by the geometric mean over the problems, relative to the shipped settings.
Add the winner by hand to the table in `kernels/attn/triton/launch.py`, once the ahead-of-time check shows no spill.
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
    """Every setting to try, the likely ones first."""
    # No 128 keys: the words of dropout bits end at a whole tile of 64.
    for queries, keys, warps, stages in itertools.product((64, 128, 32), (64, 32, 16), (4, 8, 2), (2, 3, 1, 4)):
        yield kernels.Tiles(queries, keys, warps, stages)


def problems() -> list[Problem]:
    """Problems as in training: both grids, padded, with dropout, in the dtype of mixed precision."""
    return [Problem(grid, 8, torch.bfloat16, 0.1, True, False) for grid in ("r50", "dc5")]


def call(problem: Problem, kernel: str) -> Callable[[kernels.Launch], object]:
    """Function to time: one pass of a problem with given settings."""
    tensors = problem.make()
    content = (tensors.q_content, tensors.q_spatial, tensors.k_content, tensors.rows, tensors.columns, tensors.v)
    batch, queries, heads, _ = tensors.q_content.shape
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    keep = dropout_bits(seed, bits_shape(batch, heads, queries, tensors.v.shape[1]), problem.dropout, "eager")
    inputs = kernels.Inputs(*content, tensors.valid_cells, None, keep, 0.125, drawn_probability(problem.dropout))
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
    """Seconds on each problem by setting; settings that do not fit the device or fail are left out and listed.

    Args:
        kernel: one of `KERNELS`; the settings of the others stay as shipped.
        runs: from `call`, one per problem.
        tiles: settings to try, in this order, until the time limit.
        shipped: the shipped settings, always measured.
        clock: function → its seconds.
        until: `time.monotonic()` at which to stop.
    """
    seconds: dict[kernels.Tiles, list[float]] = {}
    refused: dict[str, str] = {}
    current = getattr(shipped, kernel)
    for setting in track([current, *(tile for tile in tiles if tile != current)], description=kernel, console=console):
        if seconds and time.monotonic() > until:
            break
        launch = replace(shipped, **{kernel: setting})
        with refusing(str(setting), refused):
            seconds[setting] = [clock(lambda run=run, launch=launch: run(launch)) for run in runs]
    for name, reason in refused.items():
        console.print(f"  {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if refused and current not in seconds:
        raise RuntimeError(f"{kernel}: {refused[str(current)]}, with the shipped settings")
    return seconds


def report(kernel: str, results: dict[kernels.Tiles, list[float]]) -> None:
    """Print the ten fastest settings, relative to the first, which are the shipped ones."""
    if is_null_gpu():
        console.print(f"{kernel}: {len(results)} settings run; no durations: null GPU")
        return
    current = next(iter(results.values()))
    mean = {
        tile: exp(fsum(log(a / b) for a, b in zip(current, s, strict=True)) / len(s)) for tile, s in results.items()
    }
    table = Table(title=f"{kernel}: {len(results)} settings")
    for column in (*(field.name for field in fields(kernels.Tiles)), "speed-up", "milliseconds"):
        table.add_column(column, justify="right")
    for tile in sorted(mean, key=mean.get, reverse=True)[:10]:
        milliseconds = "  ".join(f"{1e3 * value:.4f}" for value in results[tile])
        table.add_row(*map(str, asdict(tile).values()), f"{mean[tile]:.2f}×", milliseconds)
    console.print(table)


def device_seconds(run: Callable[[], object]) -> float:
    """Seconds of one call, the median of many; NaN on a null GPU, after one call."""
    if is_null_gpu():
        run()
        return nan
    return 1e-3 * triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def main(words: list[str]) -> None:
    """Search every requested kernel and write one result file; failures of shipped settings are reported at the end."""
    parser = command("tune", __doc__)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--seconds", type=float, default=90.0, help="per kernel, compilation included")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs an NVIDIA GPU: this machine has none.")
    major, minor = torch.cuda.get_device_capability()
    shipped = kernels.launch_settings(10 * major + minor, "half", 32)
    results, failed = {}, {}
    for kernel in options.kernels:
        with refusing(f"{OURS}, {kernel}", failed):
            runs = [call(problem, kernel) for problem in problems()]
            until = time.monotonic() + options.seconds
            seconds_by_setting = search(kernel, runs, list(candidates()), shipped, device_seconds, until)
            report(kernel, seconds_by_setting)
            results[kernel] = [{**asdict(tile), "seconds": seconds} for tile, seconds in seconds_by_setting.items()]
    say_written(write("tune", {"seconds": options.seconds, "kernels": results}))
    if failed:
        raise SystemExit("\n".join(failed.values()))
