"""Memory that this process needs and may have, in bytes."""

import contextlib
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:
    # Windows lacks it.
    resource = None  # type: ignore[assignment]

_STATUS = Path("/proc/self/status")
"""Linux's numbers of this process, in KiB."""
_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Folder of a container's control group, files of its limit and use, and the line of `memory.stat` with the part of the
use that the system can free: version 2 and version 1.
"""


def reset_peak(device: torch.device) -> None:
    """Start to measure a new peak. Only Linux can do it for a process; elsewhere its peak only grows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Without this file or the right to write it, the peak stays.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int | None:
    """Peak of a GPU's allocated memory, or of this process, since `reset_peak`; None: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # In KiB. The peak of `getrusage` cannot be reset in a process whose memory was larger before it started a program.
    if highest := _value(_STATUS, "VmHWM:"):
        return highest * 1024
    if resource is None:
        return None
    # In KiB, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limit(device: torch.device) -> int | None:
    """How high the peak may become; None: not known.

    On a GPU: the memory that PyTorch may allocate, without the memory of other processes. Elsewhere: this process's
    memory, plus the memory available on the machine (Linux's `MemAvailable`) and in its container.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total)
        return min(allowed, free + torch.cuda.memory_reserved(device))
    # In KiB.
    available = _value(Path("/proc/meminfo"), "MemAvailable:")
    own = _value(_STATUS, "VmRSS:")
    if available is None or own is None:
        return None
    return own * 1024 + min([available * 1024, *_free_in_container()])


def _free_in_container() -> list[int]:
    """Free memory below each limit of the container; empty: there is no limit."""
    free = []
    for folder, limit_file, use_file, cache in _CGROUPS:
        most, used = (_number(Path(folder, name)) for name in (limit_file, use_file))
        if most is not None and used is not None:
            free.append(most - used + (_value(Path(folder, "memory.stat"), cache) or 0))
    return free


def is_exhausted(error: RuntimeError) -> bool:
    """Whether an error says that memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def _value(file: Path, name: str) -> int | None:
    """The number behind a name at the start of a line; None: there is no such file or line."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)


def _number(file: Path) -> int | None:
    """The number in a file; None: there is no file, or it says `max`."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
