"""The identity on which a record depends: the device and its driver, the libraries, and our kernels."""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
from pathlib import Path

import torch

from conddetr.kernels import native

_DRIVER_FILES = ("/sys/module/nvidia/version", "/proc/driver/nvidia/version")


def identity(device: torch.device) -> dict[str, str]:
    """Everything a record depends on, by name: hardware, driver, PyTorch, Triton, and our kernels."""
    return {
        "device": device_name(device),
        "compute capability": compute_capability(device),
        "driver": _driver() if device.type == "cuda" else "none",
        "PyTorch": str(torch.__version__),
        "Triton": _triton_version(),
        "kernels' sources": _sources(),
        "native library": _library(),
    }


def device_name(device: torch.device) -> str:
    """The model name of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def compute_capability(device: torch.device) -> str:
    """Compute capability of a GPU, e.g. "9.0"; "none" on a CPU."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "none"


def _driver() -> str:
    """The version of NVIDIA's driver; if the system does not report it, the driver's CUDA version."""
    for file in _DRIVER_FILES:
        with contextlib.suppress(OSError):
            # NVIDIA's file gives the compiler's version below the driver's.
            if match := re.search(r"\d+\.\d+(\.\d+)?", Path(file).read_text()):
                return match[0]
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
            return f"of CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return "unknown"


def _triton_version() -> str:
    # Nightly builds of PyTorch install it under other package names, but the module always has its version.
    if importlib.util.find_spec("triton") is None:
        return "none"
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return "none"


@functools.cache
def _sources() -> str:
    """A hash of this package's Python files and their names."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        content = file.read_bytes()
        # The length makes the hashed text of each list of files unique.
        digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _library() -> str:
    """A hash of the native library's build info, with its sources: the bytes of two builds differ between folders."""
    if native.NOT_LOADED is not None:
        return "none"
    return hashlib.sha256(json.dumps(native.build_info(), sort_keys=True).encode()).hexdigest()[:16]
