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

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the limit of a container, of version 2 and version 1 of control groups."""


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
    if resource is None:
        return None
    # In KiB, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limit(device: torch.device) -> int | None:
    """How high the peak may become; None: not known.

    On a GPU: all that PyTorch may allocate, without the memory of other processes. Elsewhere: what this process has and
    what is available (Linux's `MemAvailable`), at most the limit of its container.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total)
        return min(allowed, free + torch.cuda.memory_reserved(device))
    available, own = _kilobytes("/proc/meminfo", "MemAvailable"), _kilobytes("/proc/self/status", "VmRSS")
    if available is None or own is None:
        return None
    return min([available + own, *filter(None, map(_number, _CGROUP_LIMITS))])


def is_exhausted(error: RuntimeError) -> bool:
    """Whether an error says that memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def _kilobytes(file: str, name: str) -> int | None:
    """The value of a line `name: N kB`, in bytes."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(values[0]) * 1024 if values else None


def _number(file: str) -> int | None:
    """The number in a file; None: there is no file, or it says `max`."""
    try:
        text = Path(file).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
