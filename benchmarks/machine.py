"""This machine: what it is, how fast it copies, multiplies and takes exponentials, and its clock."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

from conddetr.kernels import native

HERE = Path(__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Run = Callable[[], object]
Clock = Callable[[dict[str, Run]], dict[str, float]]


def clock() -> Clock:
    """Calls each of some implementations once, in turn, and returns the seconds that each took."""
    return _device_clock() if DEVICE.type == "cuda" else _host_clock


def _host_clock(runs: dict[str, Run]) -> dict[str, float]:
    """One call of each on a CPU."""
    seconds = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - start
    return seconds


def _device_clock() -> Clock:
    """One call of each on a GPU, between device events, the L2 cache overwritten before each."""
    size = 4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    other = torch.empty(max(size, 1 << 28), dtype=torch.int8, device=DEVICE)

    def timed(runs: dict[str, Run]) -> dict[str, float]:
        events = {}
        for name, run in runs.items():
            events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            other.zero_()
            events[name][0].record()
            run()
            events[name][1].record()
        torch.cuda.synchronize()
        return {name: 1e-3 * start.elapsed_time(end) for name, (start, end) in events.items()}

    return timed


@cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a plain copy of 512 MiB on this device; the median of ten."""
    source = torch.ones(1 << 27, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median(_samples(lambda: target.copy_(source)))


@cache
def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on this device, 8192 wide on a GPU and 2048 on a CPU; the median of ten.

    In float32 on a CPU: of multiply-adds in registers, where the native kernels are built. Libraries differ in how near
    to it they come.
    """
    if DEVICE.type == "cpu" and dtype == torch.float32 and native.NOT_LOADED is None:
        return native.peak_flops()
    width = 8192 if DEVICE.type == "cuda" else 2048
    left = torch.randn(width, width, device=DEVICE).to(dtype)
    out = torch.empty_like(left)
    return 2 * width**3 / median(_samples(lambda: torch.mm(left, left, out=out)))


def _samples(run: Run) -> list[float]:
    timed = clock()
    return [timed({"": run})[""] for _ in range(12)][2:]


@cache
def exponential_rate() -> float | None:
    """`ex2` per second at the highest clock: 16 per clock and multiprocessor (CUDA programming guide).

    None on a CPU, and where the driver does not tell the clock.
    """
    megahertz = gpu_state()["max SM clock"].removesuffix(" MHz")
    if not megahertz.isdigit():
        return None
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count * 16 * 1e6 * int(megahertz)


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def gpu_state() -> dict[str, str]:
    """Driver, clocks and power limit of the GPU as nvidia-smi tells them; each "none" without a GPU."""
    queries = {
        "driver": "driver_version",
        "SM clock": "clocks.sm",
        "max SM clock": "clocks.max.sm",
        "memory clock": "clocks.mem",
        "max memory clock": "clocks.max.mem",
        "power limit": "power.limit",
    }
    if DEVICE.type != "cuda":
        return dict.fromkeys(queries, "none")
    uuid = f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"
    said = _said("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(queries.values())}", "--format=csv,noheader")
    if not said:
        return dict.fromkeys(queries, "unknown")
    return dict(zip(queries, (value.strip() for value in said.split(",")), strict=True))


def commit() -> str:
    """The commit of this checkout, "-dirty" where code differs from it; "unknown" without git."""
    code = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)docs")
    changes = _said("git", "status", "--porcelain", "--", *code)
    return f"{_said('git', 'rev-parse', '--short', 'HEAD') or 'unknown'}{'-dirty' if changes else ''}"


def _said(*command: str) -> str:
    """What a program wrote, "" where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment() -> dict[str, str]:
    """What a reader needs to know to repeat a measurement."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(),
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        # Well above the threads used: others were at work, and the times are theirs too.
        "load": f"{os.getloadavg()[0]:.1f}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "none",
        **gpu_state(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
