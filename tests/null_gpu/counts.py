"""Counts of a block of code on the null GPU: launches, waits, copies, memory."""

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
    """Kernels, and library calls that launch at least one; without the launches within a replayed graph."""
    launches_by_device: list[int] = field(default_factory=list)
    kernels: Counter = field(default_factory=Counter)
    """Launches by kernel name; C++ names are mangled."""
    graph_launches: int = 0
    waits: int = 0
    """Calls in which the host waits for the device: synchronisations and blocking copies."""
    to_device: int = 0
    """Copies from the host."""
    from_device: int = 0
    within_device: int = 0
    bytes_to_device: int = 0
    bytes_from_device: int = 0
    bytes_within_device: int = 0
    memsets: int = 0
    """Calls that clear memory. They do not count as launches, although a GPU works for each."""
    allocations: int = 0
    """Allocations by the runtime, including pinned memory; the caching allocator makes few."""
    modules: int = 0
    """Kernels compiled at run time and loaded."""
    refused_in_capture: int = 0
    """Calls that the capture of a CUDA graph forbids."""
    peak_bytes: int = 0
    """Peak of PyTorch's allocator on the current device; libraries' workspaces are empty here."""


class Totals(NamedTuple):
    """Counts since the last block of `counted` began."""

    launches: int
    waits: int
    others: int
    """Copies and memsets."""


class Launch(NamedTuple):
    """One kernel, one library call (an empty grid), or one call that clears memory (`memset`)."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    bytes: int
    """Dynamic shared memory; for a memset the bytes that it clears."""


def launched() -> list[Launch]:
    """Launches since the last block of `counted` began, in order.

    Raises:
        RuntimeError: there were 16384 or more, and the null GPU keeps no more.
    """
    launches = [Launch(name, tuple(grid), tuple(block), size) for name, grid, block, size in _read_json("null_gpu_log")]
    if len(launches) == 1 << 14:
        raise RuntimeError("the null GPU keeps 16384 launches, there were more: begin another block of `counted`")
    return launches


def totals() -> Totals:
    """Totals so far; fast enough to read after every operation."""
    numbers = (ctypes.c_long * 3)()
    ctypes.CDLL(None).null_gpu_totals(numbers)
    return Totals(*numbers)


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts of a block, filled in at its end. Needs a process with null GPUs."""
    counts = Counts()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    ctypes.CDLL(None).null_gpu_reset()
    yield counts
    values = _read_json("null_gpu_counts")
    kernels: Counter = Counter()
    for name, launches in values.pop("kernels"):
        kernels[name] += launches
    vars(counts).update(values, kernels=kernels, peak_bytes=torch.cuda.max_memory_allocated())


def _read_json(function: str) -> object:
    """The value that a function of the null GPU returns as JSON."""
    library = ctypes.CDLL(None)
    write = getattr(library, function)
    write.restype = ctypes.c_void_p
    address = write()
    value = json.loads(ctypes.string_at(address))
    library.free(ctypes.c_void_p(address))
    return value
