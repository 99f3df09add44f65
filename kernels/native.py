"""The compiled kernels of `csrc/`: loads them, and says why they are not there. How to build: docs/building.md."""

import importlib
import os

import torch

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""What the CPU kernels take; float64 is there for tests of gradients."""
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOW_TO_BUILD = "python -m pip install --no-build-isolation --editable . in the source folder builds them"


def _load() -> str | None:
    """Import `conddetr._C`, which registers `torch.ops.conddetr_native`; the reason if that fails."""
    if os.environ.get("CONDDETR_NATIVE") == "0":
        return "the environment variable CONDDETR_NATIVE is 0."
    try:
        importlib.import_module("conddetr._C")
    except ModuleNotFoundError:
        return f"the native kernels are not built ({HOW_TO_BUILD}; see docs/building.md)."
    except ImportError as error:
        return f"the native kernels do not load here: {error} ({HOW_TO_BUILD} again)."
    return None


NOT_LOADED = _load()
"""Why there are no native kernels; None if there are."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason against native kernels for such tensors, or None if they can run."""
    if NOT_LOADED is not None:
        return NOT_LOADED
    if device.type == "cpu":
        dtypes = CPU_DTYPES
    elif device.type == "cuda":
        if build_info()["cuda"] is None:
            return "the native kernels were built without CUDA (docs/building.md)."
        dtypes = CUDA_DTYPES
    else:
        return f"native kernels run on CPUs and NVIDIA GPUs, the tensors are on {device.type}."
    if dtype not in dtypes:
        names = ", ".join(str(known).removeprefix("torch.") for known in dtypes)
        return f"on {device.type} its kernels take {names}, not {str(dtype).removeprefix('torch.')}."
    return None


def build_info() -> dict[str, object]:
    """Compiler, CUDA version or None, GPU architectures, flags, and the instruction sets of the CPU kernels.

    Raises:
        RuntimeError: there are no native kernels; says why.
    """
    if NOT_LOADED is not None:
        raise RuntimeError(NOT_LOADED)
    return importlib.import_module("conddetr._C").build_info()


def describe() -> str:
    """One line: what was built, with what, and the instruction set that is used on this CPU."""
    info, level = build_info(), importlib.import_module("conddetr._C").cpu_level()
    cuda = "no CUDA" if info["cuda"] is None else f"CUDA {info['cuda']} for {', '.join(info['architectures'])}"
    return f"CPU ({level} of {', '.join(info['cpu_levels'])}), {cuda}; {info['compiler']}"


def peak_flops() -> float:
    """Float32 multiplications and additions per second of this CPU in registers, on torch's threads; takes 0.1 s.

    Raises:
        RuntimeError: there are no native kernels; says why.
    """
    if NOT_LOADED is not None:
        raise RuntimeError(NOT_LOADED)
    return importlib.import_module("conddetr._C").peak_flops()
