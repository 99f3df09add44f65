"""How long an implementation takes, forward and backward, beside the best that PyTorch has; one after the other.

On a GPU that is its time, without what the host needs to launch it.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from conddetr.kernels.check.inputs import Inputs, Maker
from conddetr.kernels.check.problem import Peer, Problem, Run, evaluate, upstream_of

Typical = Callable[[list[float]], float]
BATCH = 0.002
"""Seconds that one measurement lasts at least: single calls of short kernels are mostly noise."""
CALLS = {"cpu": 100, "cuda": 20}
"""In one measurement, at most; on a GPU so few that the launches of all of them fit into its queue."""
LONGEST = 0.2
"""Seconds that a GPU is kept busy, at most: what is called first may compile."""
CYCLES = 2.5e9
"""Of a GPU in a second, at most."""
ROUNDS = 3
"""Measurements of each, at least."""


def clock(
    problem: Problem, backend: str, dtype: torch.dtype, device: torch.device, seconds: float, typical: Typical = median
) -> tuple[float, float]:
    """Seconds of ours, and of the fastest of what PyTorch has.

    Args:
        problem: a size of the model.
        backend: of ours.
        dtype: in which it is chosen.
        device: where it runs.
        seconds: for all together, where `ROUNDS` do not take longer.
        typical: of several measurements the one that counts.
    """
    inputs = problem.make(Maker(device, dtype))
    ways = [_call(partial(problem.run, backend=backend), inputs, problem.gradients)]
    peers = problem.peers or (Peer(partial(problem.run, backend="eager"), problem.gradients),)
    ways += [_call(peer.run, inputs, peer.gradients) for peer in peers]
    ours, *theirs = [typical(times) for times in measurements(ways, device, seconds)]
    return ours, min(theirs)


def _call(run: Run, inputs: Inputs, gradients: tuple[str, ...]) -> Callable[[], object]:
    """Forward, and backward where there are gradients."""
    upstream = upstream_of(evaluate(run, inputs, ()).outputs) if gradients else None
    return lambda: evaluate(run, inputs, gradients, upstream)


def measurements(ways: list[Callable[[], object]], device: torch.device, seconds: float) -> list[list[float]]:
    """Seconds of one call of each, measured in turn, several times."""
    measure = _on_gpu if device.type == "cuda" else _on_cpu
    # The first call makes what is made once, the second says how many calls belong together.
    for way in ways:
        measure(way, 1)
    firsts = [measure(way, 1) for way in ways]
    calls = [max(1, min(CALLS[device.type], round(BATCH / max(first, 1e-9)))) for first in firsts]
    found = [[first] if max(calls) == 1 else [] for first in firsts]
    end = time.perf_counter() + seconds
    while len(found[0]) < ROUNDS or time.perf_counter() < end:
        for way, count, times in zip(ways, calls, found, strict=True):
            times.append(measure(way, count))
    return found


def _on_cpu(way: Callable[[], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        way()
    return (time.perf_counter() - begin) / count


def _on_gpu(way: Callable[[], object], count: int) -> float:
    """Of the GPU, as in a CUDA graph: it is kept busy until the host has launched everything. What makes the host wait
    for the GPU waits here too.
    """
    host = time.perf_counter()
    way()
    host = time.perf_counter() - host
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CYCLES * min(1.5 * host * count, LONGEST)))
    begin.record()
    for _ in range(count):
        way()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / count
