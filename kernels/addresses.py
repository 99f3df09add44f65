"""Tables on a device, mostly of memory addresses, for kernels that process many tensors in one launch."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_collectors: list[list[tuple[Tensor, Tensor]]] = []
"""For each active `collected`: tables that a capture reads, and their contents on the host."""


def table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses as an int64 tensor on a device; the host does not wait."""
    if device.type != "cuda" or is_capturing(device):
        return place(torch.tensor(addresses, dtype=torch.int64), device)
    return _copied(addresses, device, torch.cuda.current_stream(device).cuda_stream)


# In most steps the same tensors have the same addresses. Cached per stream, where the copy is known to be complete.
@functools.lru_cache(maxsize=64)
def _copied(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return place(torch.tensor(addresses, dtype=torch.int64), device)


def place(table: Tensor, device: torch.device) -> Tensor:
    """Copy a table from the host; the host does not wait.

    In a capture of a CUDA graph no copy is recorded, because then the host's memory would have to live as long as the
    graph: the table is empty until the capture has ended (`collected`).

    Raises:
        RuntimeError: a capture outside `collected` (see `can_place`).
    """
    if device.type != "cuda":
        return table.to(device)
    if is_capturing(device):
        if not _collectors:
            raise RuntimeError("A table of addresses is needed in a capture of a CUDA graph: capture in `collected`.")
        empty = torch.empty_like(table, device=device)
        _collectors[-1].append((empty, table))
        return empty
    return table.pin_memory().to(device, non_blocking=True)


def can_place(device: torch.device) -> bool:
    """Whether tables can be made now: not in a capture outside `collected`, which would never fill them."""
    return bool(_collectors) or not is_capturing(device)


def is_capturing(device: torch.device) -> bool:
    """Whether launches on a device are being recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def collected() -> Iterator[list[Tensor]]:
    """Fill the tables of a CUDA graph's capture at its end, on the stream that is then current, without a wait.

    Yields the tables, which must live as long as the graph.
    """
    tables: list[Tensor] = []
    _collectors.append([])
    try:
        yield tables
    finally:
        for empty, table in _collectors.pop():
            empty.copy_(table.pin_memory(), non_blocking=True)
            tables.append(empty)
