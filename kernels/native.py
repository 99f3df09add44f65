"""Loads the compiled kernels of `csrc/`, or reports why they are missing. How to build: docs/building.md."""

import importlib
import os
import re
from typing import Any

import torch

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""Dtypes of the CPU kernels; float64 is for tests of gradients."""
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOW_TO_BUILD = "python -m pip install --no-build-isolation --editable . in the source folder builds them"


def _load() -> str | None:
    """Import `conddetr._C`, which registers `torch.ops.conddetr_native`; returns the reason if that fails."""
    if os.environ.get("CONDDETR_NATIVE") == "0":
        return "the environment variable CONDDETR_NATIVE is 0."
    try:
        importlib.import_module("conddetr._C")
    except ModuleNotFoundError:
        return f"the native kernels are not built ({HOW_TO_BUILD}; see docs/building.md)."
    except ImportError as error:
        return f"the native kernels cannot be loaded: {error} ({HOW_TO_BUILD} again)."
    return None


NOT_LOADED = _load()
"""The reason why native kernels are missing; None if they are loaded."""
# Read once: torch.compile traces `why_not`, and cannot trace a call of the library.
_INFO = importlib.import_module("conddetr._C").build_info() if NOT_LOADED is None else {}


def _parsed(architecture: str) -> tuple[tuple[int, int], str, bool]:
    match = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", architecture)
    if match is None:
        raise ValueError(f"The native kernels were built for {architecture!r}, which is no GPU architecture.")
    return (int(match[1]), int(match[2])), match[3], match[4] is not None


_BUILT = [_parsed(name) for name in _INFO.get("architectures", [])]
"""Compute capability, suffix, and whether PTX exists, for every architecture of the build."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why native kernels cannot run on such tensors, or None if they can."""
    if NOT_LOADED is not None:
        return NOT_LOADED
    if device.type == "cpu":
        dtypes = CPU_DTYPES
    elif device.type == "cuda":
        if _INFO["cuda"] is None:
            return "the native kernels were built without CUDA (docs/building.md)."
        capability = torch.cuda.get_device_capability(device)
        if machine_code(capability) is None:
            return (
                f"they were built for {', '.join(_INFO['architectures'])}, but this GPU has compute capability "
                f"{capability[0]}.{capability[1]}: build with CONDDETR_CUDA_ARCHS (docs/building.md)."
            )
        dtypes = CUDA_DTYPES
    else:
        return f"native kernels run on CPUs and NVIDIA GPUs, but the tensors are on {device.type}."
    if dtype not in dtypes:
        names = ", ".join(str(known).removeprefix("torch.") for known in dtypes)
        return f"on {device.type} its kernels take {names}, not {str(dtype).removeprefix('torch.')}."
    return None


def machine_code(capability: tuple[int, int]) -> str | None:
    """The built code that CUDA chooses for a GPU: for its own capability, an older one of the same family, or PTX.

    Args:
        capability: compute capability, e.g. (9, 0).

    Returns:
        For example `sm_90a` or `PTX of compute_80`; None if no code fits.
    """
    best = None
    for code, suffix, _ in _BUILT:
        # Code such as sm_90a runs on that capability alone, other code also on later ones of the same family.
        fits = code == capability if suffix == "a" else code[0] == capability[0] and code <= capability
        if fits and (best is None or (code, suffix) > best):
            best = (code, suffix)
    if best is not None:
        return f"sm_{best[0][0]}{best[0][1]}{best[1]}"
    newest = None
    for code, suffix, has_ptx in _BUILT:
        if has_ptx and suffix == "" and code <= capability and (newest is None or code > newest):
            newest = code
    return None if newest is None else f"PTX of compute_{newest[0]}{newest[1]}"


def build_info() -> dict[str, Any]:
    """Compiler, CUDA version or None, GPU architectures, flags, and the instruction sets of the CPU kernels.

    Raises:
        RuntimeError: the native kernels are missing; gives the reason.
    """
    if NOT_LOADED is not None:
        raise RuntimeError(NOT_LOADED)
    return dict(_INFO)


def describe(device: torch.device) -> str:
    """One line: the kernels that were built, the compiler, and the code that runs on this CPU and GPU."""
    info, level = build_info(), importlib.import_module("conddetr._C").cpu_level()
    cuda = "no CUDA" if info["cuda"] is None else f"CUDA {info['cuda']} for {', '.join(info['architectures'])}"
    if info["cuda"] is not None and device.type == "cuda":
        cuda += f" (on this GPU: {machine_code(torch.cuda.get_device_capability(device)) or 'none of them'})"
    return f"CPU ({level} of {', '.join(info['cpu_levels'])}), {cuda}; {info['compiler']}"


def peak_flops() -> float:
    """Measured peak of this CPU in float32 operations per second, in registers, on torch's threads; takes 0.1 s.

    A multiplication and an addition count as two.

    Raises:
        RuntimeError: the native kernels are missing; gives the reason.
    """
    if NOT_LOADED is not None:
        raise RuntimeError(NOT_LOADED)
    return importlib.import_module("conddetr._C").peak_flops()
