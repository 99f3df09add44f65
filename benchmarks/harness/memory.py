"""Peak memory of a call."""

from dataclasses import replace
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from harness.machine import DEVICE, Run
from harness.refusals import refusing
from harness.result import Result


def peaks(runs: dict[str, Run], refused: dict[str, str]) -> dict[str, int]:
    """Peak memory of each call; calls that fail or run out of memory go to `refused`."""
    peaks = {}
    for name, run in runs.items():
        with refusing(name, refused):
            peaks[name] = _peak_extra_bytes(run)
    return peaks


def _peak_extra_bytes(run: Run) -> int:
    """Measured in the second call: the first may compile, or allocate buffers that stay."""
    run()
    torch.cuda.synchronize()
    peak = allocated_by(run)
    torch.cuda.synchronize()
    return peak


def allocated_by(run: Run) -> int:
    """Peak bytes of device memory: the allocator counts while the host queues or captures a call."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def with_host_memory(result: Result, runs: dict[str, Run]) -> Result:
    """The result; on a CPU with its memory filled in."""
    if DEVICE.type == "cuda":
        return result
    return replace(result, peak_extra_bytes={name: host_peak(runs[name]) for name in result.seconds})


def host_peak(run: Run) -> int:
    """Peak bytes that PyTorch's allocator handed out during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    # Positive for an allocation, negative for a release.
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes, initial=0))
