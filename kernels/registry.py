"""Which implementation of an operation runs, and why the others do not: one table of all operations.

Each operation declares in its `op.py` what its kernels can take (`declare`). Who calls it either demands a backend by
name, which is an error where it cannot run, or prefers: `auto`, which falls back to plain PyTorch, and the backend of a
whole model or training (`Operation.prefer`), which operations without such kernels do not know. On a GPU `auto` takes
what is proven there (`records`).
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from conddetr.kernels import native, records
from conddetr.kernels.records import memory

BACKENDS = ("triton", "native", "eager")
"""In the order in which `auto` tries them. Triton runs on GPUs alone, so that on a CPU it is the native kernels."""

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the package is there; it is not imported for this."""


TRANSFORMS = {
    "Grad": "torch.func.grad (or vjp, jacrev)",
    "Jvp": "torch.func.jvp (or jacfwd)",
    "Vmap": "torch.func.vmap",
}
"""PyTorch's own names of function transforms → their public ones."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


@dataclass(frozen=True)
class Choice:
    """The answer to: what runs here?"""

    backend: str
    """The implementation chosen."""
    refused: dict[str, str]
    """Every implementation that `auto` would have preferred, with the reason against it."""


EAGER = Choice("eager", {})


@dataclass(frozen=True)
class Kernels:
    """What the kernels of one backend can take in an operation, of what the backend can on this machine."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    """Types of devices. A CPU stands for Triton's interpreter too."""
    dtypes: tuple[torch.dtype, ...] = (*FLOATS, torch.float64)
    auto_dtypes: tuple[torch.dtype, ...] = FLOATS
    """Those that `auto` takes. In float64 native kernels are there for tests of gradients."""
    why_not: Callable[..., str | None] | None = None
    """Takes what the operation knows of its inputs, widths for example; the reason against them, or None."""
    why_not_auto: Callable[..., str | None] | None = None
    """Likewise; what keeps `auto` alone from them."""

    def misfit(self, device: torch.device, dtype: torch.dtype, is_auto: bool) -> str | None:
        """The reason against them on a device and in a dtype, or None."""
        if device.type not in self.devices:
            return f"its kernels run on {_names(self.devices)}, the tensors are on {device.type}."
        if dtype not in self.dtypes:
            return f"its kernels take {_names(self.dtypes)}, not {_names((dtype,))}."
        if is_auto and dtype not in self.auto_dtypes:
            return f"in {_names((dtype,))} `auto` takes plain PyTorch: ask for it by name."
        return None

    def refuse(self, is_auto: bool, facts: tuple) -> str | None:
        """The reason against them that the inputs give, or None; there is none without facts."""
        reason = self.why_not(*facts) if facts and self.why_not is not None else None
        if reason is None and is_auto and facts and self.why_not_auto is not None:
            reason = self.why_not_auto(*facts)
        return reason


def _names(values: tuple) -> str:
    return ", ".join({"cpu": "CPUs", "cuda": "GPUs"}.get(x) or str(x).removeprefix("torch.") for x in values)


@dataclass(frozen=True)
class Operation:
    """A row of the table. Plain PyTorch computes every operation."""

    name: str
    """Of the public function."""
    kernels: dict[str, Kernels]
    """Backend → what it can take, in the order in which `auto` tries them."""

    @property
    def backends(self) -> tuple[str, ...]:
        """Those that it has, `eager` last."""
        return (*self.kernels, "eager")

    def choose(self, requested: str, device: torch.device, dtype: torch.dtype, *facts: object) -> Choice:
        """Pick an implementation.

        Args:
            requested: `auto`, a preference; or one of `BACKENDS`, a demand.
            device, dtype: of the tensors.
            facts: what else kernels may not take, as the operation declared it. Without any, what is found is right
                for ordinary inputs.

        Raises:
            ValueError: no such backend.
            BackendError: the requested backend cannot run here; says why.
        """
        if requested == "eager":
            return EAGER
        if requested != "auto":
            reason = self.why_not(requested, device, dtype, *facts)
            if reason is not None:
                raise BackendError(f"backend {requested!r} cannot run here: {reason}")
            return Choice(requested, {})
        refused: dict[str, str] = {}
        for backend, kernels, misfit, unproven in self._answers(device, dtype):
            reason = misfit or kernels.refuse(True, facts) or unproven
            if reason is None:
                return Choice(backend, refused)
            refused[backend] = reason
        return Choice("eager", refused)

    def _answers(self, device: torch.device, dtype: torch.dtype) -> "list[_Answer]":
        """What is known of all kernels without the inputs. On a GPU every call asks, so that it is looked up there."""
        if device.index is None or torch.compiler.is_compiling() or transforms():
            return self._ask(device, dtype)
        # These, whatever another thread makes of records meanwhile.
        answers, key = memory.answers, (self.name, device, dtype, _is_demanded.get())
        if key not in answers:
            answers[key] = self._ask(device, dtype)
        return answers[key]

    def _ask(self, device: torch.device, dtype: torch.dtype) -> "list[_Answer]":
        found = []
        for backend, kernels in self.kernels.items():
            misfit = why_not(backend, device, dtype, is_auto=True) or kernels.misfit(device, dtype, is_auto=True)
            unproven = None if misfit else _why_unproven(self.name, backend, device, dtype)
            found.append(_Answer(backend, kernels, misfit, unproven))
        return found

    def prefer(self, backend: str, device: torch.device, dtype: torch.dtype, *facts: object) -> Choice:
        """As `choose`, for the backend of a whole model or training: where it cannot run here, plain PyTorch does."""
        if backend == "auto":
            return self.choose("auto", device, dtype, *facts)
        reason = self.why_not(backend, device, dtype, *facts)
        return Choice(backend, {}) if reason is None else Choice("eager", {backend: reason})

    def why_not(self, backend: str, device: torch.device, dtype: torch.dtype, *facts: object) -> str | None:
        """The reason why a demand for this backend is an error, or None.

        Raises:
            ValueError: no such backend.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}.")
        if backend == "eager":
            return None
        if backend not in self.kernels:
            return "this operation has no such kernels."
        reason = why_not(backend, device, dtype)
        kernels = self.kernels[backend]
        return reason or kernels.misfit(device, dtype, False) or kernels.refuse(False, facts)


class _Answer(NamedTuple):
    """What is known of the kernels of a backend without the inputs."""

    backend: str
    kernels: Kernels
    misfit: str | None
    """Why they cannot run here, or not for `auto`."""
    unproven: str | None
    """Why `auto` does not take them all the same."""


_is_demanded: ContextVar[bool] = ContextVar("is_demanded", default=False)


def demanded(backend: str) -> AbstractContextManager[None]:
    """Within, `auto` takes kernels that are not proven on this GPU, if a model's backend is given by name: many of its
    operations are called with `auto`.
    """
    # Compiled, those are PyTorch's.
    return nullcontext() if backend in ("auto", "eager") or torch.compiler.is_compiling() else _demanded()


@contextmanager
def _demanded() -> Iterator[None]:
    token = _is_demanded.set(True)
    try:
        yield
    finally:
        _is_demanded.reset(token)


def _why_unproven(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if not torch.compiler.is_compiling() and _is_demanded.get():
        return None
    return records.why_not(operation, backend, device, dtype)


OPERATIONS: dict[str, Operation] = {}
"""The table: name of the public function → operation."""


def declare(name: str, *, triton: Kernels | None = None, native: Kernels | None = None) -> Operation:
    """Add an operation to the table.

    Args:
        name: of its public function.
        triton, native: what these kernels can take; None: there are none.
    """
    kernels = {"triton": triton, "native": native}
    OPERATIONS[name] = Operation(name, {backend: found for backend, found in kernels.items() if found is not None})
    return OPERATIONS[name]


def why_not(backend: str, device: torch.device, dtype: torch.dtype, is_auto: bool = False) -> str | None:
    """The reason why kernels of a backend cannot run on this machine, or None. Plain PyTorch always can."""
    if backend == "eager":
        return None
    active = transforms()
    if active:
        return f'its operators do not support {active[0]}: use backend="eager".'
    if backend == "native":
        return native.why_not(device, dtype)
    if not HAS_TRITON:
        return "the package triton is not installed (pip install triton; Linux only)."
    if dtype not in FLOATS:
        return f"its kernels take float32, float16 and bfloat16, not {dtype}."
    if device.type == "cuda":
        major, minor = capability(device)
        return None if major >= 8 else f"its kernels need compute capability 8.0, this GPU has {major}.{minor}."
    if not is_interpreting():
        return f"its kernels run on NVIDIA GPUs, the tensors are on {device.type} (TRITON_INTERPRET=1 emulates)."
    return "the interpreter is for tests: ask for it by name." if is_auto else None


_capability = functools.cache(torch.cuda.get_device_capability)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU, which PyTorch takes longer to tell than to add two tensors."""
    # torch.compile warns of caches, and asks once. Without an index it is the current device, which changes.
    is_asked = device.index is None or torch.compiler.is_compiling()
    return (torch.cuda.get_device_capability if is_asked else _capability)(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def transforms() -> list[str]:
    """The function transforms and forward-mode differentiation that are going on, innermost first, by their public
    names. Operators that have a gradient alone fail there, or give no tangents.
    """
    # PyTorch has no public way to ask. Functionalisation is a transform too, which our operators are fit for.
    if not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
        return []
    active = []
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            return ["transforms of torch.func"]
        keys = [interpreter.key().name for interpreter in reversed(torch._C._functorch.get_interpreter_stack())]
        active = [TRANSFORMS[key] for key in keys if key in TRANSFORMS]
    if not active and forward_ad._current_level >= 0:
        active = ["forward-mode differentiation (torch.autograd.forward_ad)"]
    return active


def refuse_vmap(what: str) -> None:
    """Raise a BackendError inside `torch.func.vmap`, for what sizes or the host's work depend on values."""
    if TRANSFORMS["Vmap"] in transforms():
        raise BackendError(f'{what} does not run inside torch.func.vmap, not even with backend="eager".')


def is_interpreting() -> bool:
    """Whether Triton's interpreter was asked for, by its own environment variable."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
