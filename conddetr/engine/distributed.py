"""Runs of several processes (`torchrun`) or of one.

Every function here also works without a process group, at no cost.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conddetr.devices import find_device


@contextlib.contextmanager
def process_group(device: str = "") -> Iterator[torch.device]:
    """Join the group that torchrun's environment describes, if any; yields the device of this process.

    Args:
        device: as torch names it; default: CUDA if available. Under torchrun each process uses the GPU of its local
            rank. CUDA processes communicate through NCCL, others through Gloo.

    Raises:
        ValueError: as `find_device`.
    """
    target = find_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _has_group():
        yield target
        return
    if target.type == "cuda":
        target = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(target)
    dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    try:
        yield target
    finally:
        dist.destroy_process_group()
        # Gloo's thread needs Python's global lock (GIL) to free its last tensors. In PyTorch 2.11, freeing a
        # DistributedDataParallel waits for that thread while it holds the lock: a deadlock, if it came first.
        time.sleep(0.1)


def _has_group() -> bool:
    # Some builds of PyTorch lack torch.distributed.
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes in the run."""
    return dist.get_world_size() if _has_group() else 1


def rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if _has_group() else 0


def is_main() -> bool:
    """Whether this process writes logs and checkpoints."""
    return rank() == 0


def reduce_max(values: Tensor) -> Tensor:
    """Maximum of each entry over all processes, in place, on every process."""
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any process; every process must call it. `device`: this process's device."""
    return flag if world_size() == 1 else bool(reduce_max(torch.tensor(float(flag), device=device)))


def reduce_mean(values: Tensor) -> Tensor:
    """Mean of each entry over all processes, in place, on every process."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of ranks, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_host(value: Any) -> list[Any]:
    """As `gather`, but through a separate Gloo group, without a GPU; other processes may arrive minutes later."""
    if world_size() == 1:
        return [value]
    group = dist.new_group(backend="gloo")
    values: list[Any] = [None] * world_size()
    try:
        dist.all_gather_object(values, value, group=group)
    finally:
        dist.destroy_process_group(group)
    return values


class StopRequest:
    """Turns the first SIGTERM or SIGINT (Ctrl-C) after `watch` into a request to stop. A second one acts as usual.

    A context manager for the main thread. In other threads signals cannot be caught, and it does nothing.
    """

    def __init__(self) -> None:
        self.name = ""
        """Name of the received signal; empty: none."""
        self._before: dict[int, Any] = {}

        self._is_watching = False

    def __enter__(self) -> "StopRequest":
        return self

    def watch(self) -> None:
        """Catch signals from now on. Call it when there is a state to save; before, signals end the process at once."""
        if not self._is_watching and threading.current_thread() is threading.main_thread():
            signals = (signal.SIGTERM, signal.SIGINT)
            self._before = {number: signal.signal(number, self._on_signal) for number in signals}
        self._is_watching = True

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
