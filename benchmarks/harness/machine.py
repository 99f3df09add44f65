"""This machine, and the conditions that a reader of its results needs."""

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
"""Paths that benchmarks write."""
PEERS = ("torch-linear-assignment", "flash-attn-4", "transformers")
"""Packages beside PyTorch whose versions define the peers."""
Run = Callable[[], object]


def is_null_gpu() -> bool:
    """Whether the GPU is the tests' null GPU, which computes nothing, so that no time measured on it means anything."""
    return device_name().endswith("(null)")


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 products and convolutions in float32: by default cuDNN rounds convolution operands to ten bits.

    Both switches are PyTorch's older ones. They set the newer `fp32_precision` too. If that is set alone, PyTorch
    raises an error where inductor reads the older ones.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    with warnings.catch_warnings():
        # Some PyTorch releases warn that the older switches are deprecated.
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
    """Operations for which PyTorch uses TF32 at present; "none" on a CPU, which has no TF32."""
    if DEVICE.type != "cuda":
        return "none"
    switches = {"products": torch.backends.cuda.matmul, "convolutions": torch.backends.cudnn}
    used = [name for name, switch in switches.items() if switch.allow_tf32]
    return f"on for {' and '.join(used)}" if used else "off"


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype in titles of problems with matrix products: on a GPU float32 adds that TF32 is off (`without_tf32`)."""
    is_without = DEVICE.type == "cuda" and dtype == torch.float32
    return f"{short_name(dtype)}{', TF32 off' if is_without else ''}"


def short_name(dtype: torch.dtype) -> str:
    """For example `float32`."""
    return str(dtype).removeprefix("torch.")


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    name = records.device_name(DEVICE)
    return name if DEVICE.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"


def gpu_state() -> dict[str, str]:
    """Driver, clocks and power limit of the GPU as nvidia-smi reports them; each "none" without a GPU."""
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
    output = _output("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(queries.values())}", "--format=csv,noheader")
    if not output:
        return dict.fromkeys(queries, "unknown")
    return dict(zip(queries, (value.strip() for value in output.split(",")), strict=True))


def commit() -> str:
    """The commit of this checkout, with "-dirty" if code differs from it.

    Without git or a checkout it is the environment variable CONDDETR_COMMIT, to be set when the code is copied to a
    machine without git; "unknown" if that is not set.
    """
    head = _output("git", "rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("CONDDETR_COMMIT") or "unknown"
    code = (":/", *(f":(top,exclude){written}" for written in WRITTEN))
    return f"{head}{'-dirty' if _output('git', 'status', '--porcelain', '--', *code) else ''}"


def _output(*command: str) -> str:
    """Output of a program; "" if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment() -> dict[str, str]:
    """Conditions that a reader needs to repeat a measurement."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(),
        "compute capability": records.compute_capability(DEVICE),
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        # Well above the number of threads: other programs ran and disturbed the times.
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
