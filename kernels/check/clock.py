"""Times an implementation, forward and backward, against PyTorch's fastest alternative, in turn.

On a GPU this is device time, without the host's launch overhead.
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
"""Minimum seconds of one measurement: single calls of short kernels are mostly noise."""
CALLS = {"cpu": 100, "cuda": 20}
"""Maximum calls in one measurement; on a GPU, few enough that all launches fit into its queue."""
LONGEST = 0.2
"""Maximum seconds that a GPU is kept busy before a measurement: the first call may compile."""
CYCLES = 2.5e9
"""Upper bound of a GPU's clock, in cycles per second."""
ROUNDS = 3
"""Minimum number of measurements of each run."""


def clock(
    problem: Problem, backend: str, dtype: torch.dtype, device: torch.device, seconds: float, typical: Typical = median
) -> tuple[float, float]:
    """Return the seconds of our implementation and of PyTorch's fastest alternative.

    Args:
        problem: a size of the model.
        backend: our implementation.
        dtype: the dtype by which it is chosen.
        device: where it runs.
        seconds: duration of all measurements together, unless `ROUNDS` rounds take longer.
        typical: reduces several measurements to one number.
    """
    inputs = problem.make(Maker(device, dtype))
    runs = [_call(partial(problem.run, backend=backend), inputs, problem.gradients)]
    peers = problem.peers or (Peer(partial(problem.run, backend="eager"), problem.gradients),)
    runs += [_call(peer.run, inputs, peer.gradients) for peer in peers]
    ours, *alternatives = [typical(times) for times in measurements(runs, device, seconds)]
    return ours, min(alternatives)


def _call(run: Run, inputs: Inputs, gradients: tuple[str, ...]) -> Callable[[], object]:
    """A call of forward, and of backward if there are gradients."""
    upstream = upstream_of(evaluate(run, inputs, ()).outputs) if gradients else None
    return lambda: evaluate(run, inputs, gradients, upstream)


def measurements(runs: list[Callable[[], object]], device: torch.device, seconds: float) -> list[list[float]]:
    """Seconds per call of each function: several measurements, taken in turn."""
    measure = _on_gpu if device.type == "cuda" else _on_cpu
    # The first call sets up caches, the second determines the number of calls in a measurement.
    for run in runs:
        measure(run, 1)
    firsts = [measure(run, 1) for run in runs]
    calls = [max(1, min(CALLS[device.type], round(BATCH / max(first, 1e-9)))) for first in firsts]
    times = [[first] if max(calls) == 1 else [] for first in firsts]
    end = time.perf_counter() + seconds
    while len(times[0]) < ROUNDS or time.perf_counter() < end:
        for run, count, seconds_of_run in zip(runs, calls, times, strict=True):
            seconds_of_run.append(measure(run, count))
    return times


def _on_cpu(run: Callable[[], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begin) / count


def _on_gpu(run: Callable[[], object], count: int) -> float:
    """Device time, as in a CUDA graph: the GPU is kept busy until the host has launched everything. Synchronizations
    inside the call still count.
    """
    host = time.perf_counter()
    run()
    host = time.perf_counter() - host
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CYCLES * min(1.5 * host * count, LONGEST)))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / count
