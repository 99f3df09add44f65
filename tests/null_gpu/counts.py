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


def totals() -> Totals:
    """Quick to ask, so that what happened between two moments can be told."""
    numbers = (ctypes.c_long * 3)()
    ctypes.CDLL(None).null_gpu_totals(numbers)
    return Totals(*numbers)


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts of the block, filled in at its end. Needs a process that has null GPUs."""
    library = ctypes.CDLL(None)
    library.null_gpu_counts.restype = ctypes.c_void_p
    counts = Counts()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    library.null_gpu_reset()
    yield counts
    address = library.null_gpu_counts()
    found = json.loads(ctypes.string_at(address))
    library.free(ctypes.c_void_p(address))
    kernels: Counter = Counter()
    for name, launches in found.pop("kernels"):
        kernels[name] += launches
    vars(counts).update(found, kernels=kernels, peak_bytes=torch.cuda.max_memory_allocated())
