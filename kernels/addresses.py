"""Tables on a device, of memory addresses above all, for kernels that walk over many tensors in one launch."""

import functools

import torch
from torch import Tensor

_captured: list[tuple[Tensor, Tensor]] = []
"""Tables that a capture of a CUDA graph reads, and on the host what belongs in them."""


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
    does: the table is empty until `fill_captured`.
    """
    if device.type != "cuda":
        return table.to(device)
    if is_capturing(device):
        empty = torch.empty_like(table, device=device)
        _captured.append((empty, table))
        return empty
    return table.pin_memory().to(device, non_blocking=True)


def is_capturing(device: torch.device) -> bool:
    """Whether launches on a device are being recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def fill_captured() -> list[Tensor]:
    """Fill the tables of a capture that has ended, on the current stream; to be kept as long as the graph."""
    tables = []
    while _captured:
        empty, table = _captured.pop()
        empty.copy_(table.pin_memory(), non_blocking=True)
        tables.append(empty)
    return tables
