"""Interleaved timing of all implementations of one problem."""

import argparse
import time

import torch
from rich.progress import track

from harness.machine import DEVICE, Run, is_null_gpu
from harness.memory import allocated_by, peaks
from harness.rates import clock
from harness.refusals import refusing
from harness.result import Result, Work
from harness.show import console

WARMUP = 2


def measure(
    title: str, runs: dict[str, Run], options: argparse.Namespace, work: Work | None, refused: dict[str, str]
) -> Result:
    """Time all implementations of one problem, in turn within each round, so that drift affects all equally.

    Args:
        title: of the problem.
        runs: implementation → call to time.
        options: `rounds` calls of each (at least 5 if they take more than 20 s in all), `cudagraph`.
        work: of the problem.
        refused: implementations that are not in `runs`, with the reasons. The result adds those that fail here.
    """
    refused, peak = dict(refused), {}
    if options.cudagraph:
        runs, peak = _captured(runs, refused)
    elif DEVICE.type == "cuda":
        peak = peaks(runs, refused)
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
    """Replays of CUDA graphs, and the memory of each capture; calls that cannot be captured go to `refused`."""
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
