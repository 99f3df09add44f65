"""Which implementation of an operation runs, and why the others do not; and what all Triton kernels share.

Triton compiles a kernel anew for an integer that is 1 or a multiple of 16, to know it while compiling. For strides
something is won by it: wide loads. For sizes nothing is, and a training would stand still for seconds at the first
image whose width happens to be one: each kernel names its sizes in `SIZES`, which are not specialised.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from conddetr.kernels import native

BACKENDS = ("triton", "native", "eager")
"""In the order in which `auto` tries them. Triton runs on GPUs alone, so that on a CPU it is the native kernels."""


WITHOUT_NATIVE = ("triton", "eager")
"""What operations offer that have no native kernels."""


NATIVE_ALONE = ("native", "eager")
"""What operations offer that have no Triton kernels."""


HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the package is there; it is not imported for this."""


class BackendError(RuntimeError):
    """A backend that was asked for by name can not run here; the message says why."""


@dataclass(frozen=True)
class Choice:
    """The answer to: what runs here?"""

    backend: str
    """The implementation chosen."""
    refused: dict[str, str]
    """Every implementation that `auto` would have preferred, with the reason against it."""


def choose(requested: str, device: torch.device, dtype: torch.dtype, offered: tuple[str, ...] = BACKENDS) -> Choice:
    """Pick an implementation.

    Args:
        requested: `auto`, or one of `BACKENDS`, which then must be able to run.
        device: of the tensors.
        dtype: of the tensors.
        offered: those of `BACKENDS` that the operation has.

    Raises:
        ValueError: no such backend.
        BackendError: the requested backend can not run here; says why and what to do.
    """
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {requested!r}.")
    refused: dict[str, str] = {}
    for backend in BACKENDS if requested == "auto" else (requested,):
        reason = "this operation has no such kernels."
        if backend in offered:
            reason = why_not(backend, device, dtype, requested == "auto")
        if reason is None:
            return Choice(backend, refused)
        refused[backend] = reason
    raise BackendError(f"backend {requested!r} can not run here: {refused[requested]}")


def why_not(backend: str, device: torch.device, dtype: torch.dtype, is_auto: bool = True) -> str | None:
    """The reason against an implementation, or None if it can run. Plain PyTorch always can."""
    if backend == "eager":
        return None
    if backend == "native":
        if is_auto and dtype == torch.float64:
            return "its float64 sines are as exact as float32's, for tests of gradients: ask for it by name."
        return native.why_not(device, dtype)
    if not HAS_TRITON:
        return "the package triton is not installed (pip install triton; Linux only)."
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, not {dtype}."
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"its kernels need compute capability 8.0, this GPU has {major}.{minor}."
    if not is_interpreting():
        return f"its kernels run on NVIDIA GPUs, the tensors are on {device.type} (TRITON_INTERPRET=1 emulates)."
    return "the interpreter is for tests: ask for it by name." if is_auto else None


def on_their_device(launch: Callable) -> Callable:
    """A function that launches Triton kernels, run with the device of its first tensor as the current one.

    Triton launches on the current device, wherever the tensors are; native and PyTorch's operators look at them.
    """

    @functools.wraps(launch)
    def run(first: torch.Tensor, *others: object) -> object:
        with torch.cuda.device_of(first):
            return launch(first, *others)

    return run


def is_interpreting() -> bool:
    """Whether Triton's interpreter was asked for, by its own environment variable."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def namespaces() -> list[str]:
    """Where operators are registered, under one schema each: Triton's always, the native ones where they are built."""
    return ["conddetr"] if native.NOT_LOADED else ["conddetr", "conddetr_native"]


def operators(backend: str) -> object:
    """`torch.ops.…` of a backend that is not eager."""
    return torch.ops.conddetr_native if backend == "native" else torch.ops.conddetr
