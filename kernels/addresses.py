"""Tables on a device, of memory addresses above all, for kernels that walk over many tensors in one launch."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_collectors: list[list[tuple[Tensor, Tensor]]] = []
"""Of every `collected` that is going on, tables that a capture reads, and on the host what belongs in them."""


def table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses as an int64 tensor on a device; the host does not wait."""
    if device.type != "cuda" or is_capturing(device):
        return place(torch.tensor(addresses, dtype=torch.int64), device)
    return _copied(addresses, device, torch.cuda.current_stream(device).cuda_stream)


# The same tensors lie at the same addresses in most steps. By stream, since only there the copy is known to be done.
@functools.lru_cache(maxsize=64)
def _copied(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return place(torch.tensor(addresses, dtype=torch.int64), device)


def place(table: Tensor, device: torch.device) -> Tensor:
    """A copy of a table of the host; the host does not wait for it.

    In a capture of a CUDA graph no copy is recorded, for then the host's memory would have to stay as long as the graph
    does: the table is empty until the capture has ended (`collected`).

    Raises:
        RuntimeError: a capture that nobody collects tables of (`can_place`).
    """
    if device.type != "cuda":
        return table.to(device)
    if is_capturing(device):
        if not _collectors:
            raise RuntimeError("A table of addresses in a capture of a CUDA graph: capture within `collected`.")
        empty = torch.empty_like(table, device=device)
        _collectors[-1].append((empty, table))
        return empty
    return table.pin_memory().to(device, non_blocking=True)


def can_place(device: torch.device) -> bool:
    """Whether there can be new tables now: not in a capture whose tables nobody fills afterwards."""
    return bool(_collectors) or not is_capturing(device)


def is_capturing(device: torch.device) -> bool:
    """Whether launches on a device are being recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def collected() -> Iterator[list[Tensor]]:
    """Around a capture of a CUDA graph: fills its tables at the end, on the then current stream, without a wait.

    Gives the tables, which must live as long as the graph.
    """
    tables: list[Tensor] = []
    _collectors.append([])
    try:
        yield tables
    finally:
        for empty, table in _collectors.pop():
            empty.copy_(table.pin_memory(), non_blocking=True)
            tables.append(empty)
