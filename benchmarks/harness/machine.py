"""This machine: what it is, and what a reader of its results has to know."""

import os
import platform
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from conddetr.kernels import records

HERE = Path(__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WRITTEN = ("benchmarks/results", "benchmarks/counts/*.json", "benchmarks/predictions", "docs", "kernels/measured")
"""What benchmarks write."""
PEERS = ("torch-linear-assignment", "flash-attn-4", "transformers")
"""Packages beside PyTorch whose version decides what a peer is."""
Run = Callable[[], object]


def is_null_gpu() -> bool:
    """Whether the GPU is the null one of the tests, which computes nothing: no time measured on it is a time."""
    return device_name().endswith("(null)")


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products and convolutions of float32 in float32: cuDNN rounds a convolution's operands to ten bits by default.

    Both switches are PyTorch's older ones. They set the newer `fp32_precision` too; set alone, that one makes PyTorch
    raise where inductor reads the older.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    with warnings.catch_warnings():
        # Some releases call the older switches deprecated.
        warnings.simplefilter("ignore")
        before = [switch.allow_tf32 for switch in switches]
        for switch in switches:
            switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was


def tf32() -> str:
    """What PyTorch would use TF32 for now; "none" on a CPU, which has none."""
    if DEVICE.type != "cuda":
        return "none"
    switches = {"products": torch.backends.cuda.matmul, "convolutions": torch.backends.cudnn}
    used = [name for name, switch in switches.items() if switch.allow_tf32]
    return f"on for {' and '.join(used)}" if used else "off"


def dtype_name(dtype: torch.dtype) -> str:
    """For titles of what is made of products: on a GPU float32 says that TF32 is off, see `without_tf32`."""
    is_without = DEVICE.type == "cuda" and dtype == torch.float32
    return f"{short_name(dtype)}{', TF32 off' if is_without else ''}"


def short_name(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    name = records.device_name(DEVICE)
    return name if DEVICE.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"


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
    """The commit of this checkout, "-dirty" where code differs from it.

    Where git is absent, or this is no checkout: the environment variable CONDDETR_COMMIT, which whoever copies the
    code to a machine without git sets; "unknown" without it.
    """
    head = _said("git", "rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("CONDDETR_COMMIT") or "unknown"
    code = (":/", *(f":(top,exclude){written}" for written in WRITTEN))
    return f"{head}{'-dirty' if _said('git', 'status', '--porcelain', '--', *code) else ''}"


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
        "compute capability": records.compute_capability(DEVICE),
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        # Well above the threads used: others were at work, and the times are theirs too.
        "load": f"{os.getloadavg()[0]:.1f}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "none",
        "cuDNN": str(torch.backends.cudnn.version()) if DEVICE.type == "cuda" else "none",
        "TF32": tf32(),
        **{package: _version(package) for package in PEERS},
        **gpu_state(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
