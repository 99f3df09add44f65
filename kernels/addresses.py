"""Tables on a device, of memory addresses above all, for kernels that walk over many tensors in one launch."""

import functools

import torch
from torch import Tensor

_captured: list[tuple[Tensor, tuple[int, ...]]] = []
"""Tables that a capture of a CUDA graph reads, and what belongs in them."""


def table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers as an int64 tensor on a device, without a wait of the host.

    A capture records no copy from the host, which would have to stay there as long as the graph: it gets an empty
    table that `fill_captured` fills.
    """
    if device.type != "cuda":
        return without_wait(addresses, device)
    if torch.cuda.is_current_stream_capturing():
        empty = torch.empty(len(addresses), dtype=torch.int64, device=device)
        _captured.append((empty, addresses))
        return empty
    return _copied(addresses, device, torch.cuda.current_stream(device).cuda_stream)


# The same tensors lie at the same addresses in most steps. By stream, since only there the copy is known to be done.
@functools.lru_cache(maxsize=64)
def _copied(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return without_wait(addresses, device)


def without_wait(numbers: object, device: torch.device) -> Tensor:
    """Nested sequences of numbers as an int64 tensor on a device; the host does not wait for the copy."""
    made = torch.tensor(numbers, dtype=torch.int64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def fill_captured() -> list[Tensor]:
    """Fill the tables of captures that have ended; the caller keeps them as long as the graph."""
    tables = []
    while _captured:
        empty, addresses = _captured.pop()
        empty.copy_(torch.tensor(addresses, dtype=torch.int64))
        tables.append(empty)
    return tables
