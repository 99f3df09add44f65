"""What a block of code asks of the null GPU: launches, waits, copies, memory."""

import ctypes
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


@dataclass
class Counts:
    """All zeros until the block ends."""

    launches: int = 0
    """Kernels, and calls of libraries that launch at least one. Those of a replayed graph are not in it."""
    launches_by_device: list[int] = field(default_factory=list)
    kernels: Counter = field(default_factory=Counter)
    """Launches by the kernel's name, mangled where it is C++."""
    graph_launches: int = 0
    waits: int = 0
    """Calls with which the host waits for the device: synchronisations and blocking copies."""
    to_device: int = 0
    """Copies from the host."""
    from_device: int = 0
    within_device: int = 0
    bytes_to_device: int = 0
    bytes_from_device: int = 0
    bytes_within_device: int = 0
    memsets: int = 0
    """Orders to clear memory, which are no launches here, although a GPU works for each."""
    allocations: int = 0
    """Of the runtime, pinned memory included; the caching allocator makes few."""
    modules: int = 0
    """Kernels that were compiled at run time, and loaded."""
    refused_in_capture: int = 0
    """Calls that a capture of a CUDA graph forbids."""
    peak_bytes: int = 0
    """Of PyTorch's allocator on the current device; libraries' workspaces are none here."""


class Totals(NamedTuple):
    """What there was since the last block of `counted` began."""

    launches: int
    waits: int
    others: int
    """Copies and memsets."""


class Launch(NamedTuple):
    """One kernel, one call of a library (an empty grid), or one order to clear memory (`memset`)."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    bytes: int
    """Of dynamic shared memory; of a memset those that it clears."""


def launched() -> list[Launch]:
    """What there was since the last block of `counted` began, in order.

    Raises:
        RuntimeError: there was more than the null GPU keeps, 16384.
    """
    found = [Launch(name, tuple(grid), tuple(block), size) for name, grid, block, size in _told("null_gpu_log")]
    if len(found) == 1 << 14:
        raise RuntimeError("the null GPU keeps 16384 launches, there were more: begin another block of `counted`")
    return found


def totals() -> Totals:
    """Quick to ask, so that what happened between two moments can be told."""
    numbers = (ctypes.c_long * 3)()
    ctypes.CDLL(None).null_gpu_totals(numbers)
    return Totals(*numbers)


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts of the block, filled in at its end. Needs a process that has null GPUs."""
    counts = Counts()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    ctypes.CDLL(None).null_gpu_reset()
    yield counts
    found = _told("null_gpu_counts")
    kernels: Counter = Counter()
    for name, launches in found.pop("kernels"):
        kernels[name] += launches
    vars(counts).update(found, kernels=kernels, peak_bytes=torch.cuda.max_memory_allocated())


def _told(function: str) -> object:
    """What a function of the null GPU writes as JSON."""
    library = ctypes.CDLL(None)
    told = getattr(library, function)
    told.restype = ctypes.c_void_p
    address = told()
    found = json.loads(ctypes.string_at(address))
    library.free(ctypes.c_void_p(address))
    return found
