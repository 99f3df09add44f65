"""The table of all operations: which implementation runs, and why the others do not.

Each operation declares in its `op.py` which inputs its kernels support (`declare`). A backend requested by name raises
an error if it cannot run. A preference falls back to plain PyTorch: `auto`, or the backend of a whole model or training
(`Operation.prefer`), which some operations may lack. On a GPU `auto` uses kernels that are proven there (`records`).
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
"""In the order in which `auto` tries them. Triton runs on GPUs only, so on CPUs the first are the native kernels."""

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the package is installed; it is not imported for this."""


TRANSFORMS = {
    "Grad": "torch.func.grad (or vjp, jacrev)",
    "Jvp": "torch.func.jvp (or jacfwd)",
    "Vmap": "torch.func.vmap",
}
"""PyTorch's internal names of function transforms → their public names."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """A backend requested by name cannot run here; the message gives the reason."""


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and the ones refused before it."""

    backend: str
    """The implementation chosen."""
    refused: dict[str, str]
    """Every implementation that `auto` would have preferred → the reason against it."""


EAGER = Choice("eager", {})


@dataclass(frozen=True)
class Kernels:
    """Inputs that the kernels of one backend support in an operation, besides the limits of the backend itself."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    """Types of devices. "cpu" includes Triton's interpreter."""
    dtypes: tuple[torch.dtype, ...] = (*FLOATS, torch.float64)
    auto_dtypes: tuple[torch.dtype, ...] = FLOATS
    """Dtypes in which `auto` uses the kernels. Native float64 kernels are for tests of gradients."""
    why_not: Callable[..., str | None] | None = None
    """Takes the operation's facts about its inputs, for example widths; returns the reason against them, or None."""
    why_not_auto: Callable[..., str | None] | None = None
    """Likewise, for reasons that apply to `auto` alone."""

    def misfit(self, device: torch.device, dtype: torch.dtype, is_auto: bool) -> str | None:
        """The reason against these kernels on a device and in a dtype, or None."""
        if device.type not in self.devices:
            return f"its kernels run on {_names(self.devices)}, but the tensors are on {device.type}."
        if dtype not in self.dtypes:
            return f"its kernels take {_names(self.dtypes)}, not {_names((dtype,))}."
        if is_auto and dtype not in self.auto_dtypes:
            return f"in {_names((dtype,))} `auto` uses plain PyTorch: request this backend by name."
        return None

    def refuse(self, is_auto: bool, facts: tuple) -> str | None:
        """The reason against these kernels for inputs with these facts, or None; None without facts."""
        reason = self.why_not(*facts) if facts and self.why_not is not None else None
        if reason is None and is_auto and facts and self.why_not_auto is not None:
            reason = self.why_not_auto(*facts)
        return reason


def _names(values: tuple) -> str:
    return ", ".join({"cpu": "CPUs", "cuda": "GPUs"}.get(x) or str(x).removeprefix("torch.") for x in values)


@dataclass(frozen=True)
class Operation:
    """A row of the table. Plain PyTorch can compute every operation."""

    name: str
    """Name of the public function."""
    kernels: dict[str, Kernels]
    """Backend → its kernels, in the order in which `auto` tries them."""

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends of this operation, `eager` last."""
        return (*self.kernels, "eager")

    def choose(self, requested: str, device: torch.device, dtype: torch.dtype, *facts: object) -> Choice:
        """Choose an implementation.

        Args:
            requested: `auto`, a preference; or one of `BACKENDS`, a requirement.
            device, dtype: of the tensors.
            facts: further properties of the inputs, as the operation declared them. Without any, the choice holds for
                ordinary inputs.

        Raises:
            ValueError: the backend is unknown.
            BackendError: the requested backend cannot run here; gives the reason.
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
        """The checks of all kernels that do not depend on the facts; cached on GPUs, where every call needs them."""
        if device.index is None or torch.compiler.is_compiling() or transforms():
            return self._check_all(device, dtype)
        # One reference to the cache: another thread may replace it when records change.
        answers, key = memory.answers, (self.name, device, dtype, _is_demanded.get())
        if key not in answers:
            answers[key] = self._check_all(device, dtype)
        return answers[key]

    def _check_all(self, device: torch.device, dtype: torch.dtype) -> "list[_Answer]":
        answers = []
        for backend, kernels in self.kernels.items():
            misfit = why_not(backend, device, dtype, is_auto=True) or kernels.misfit(device, dtype, is_auto=True)
            unproven = None if misfit else _why_unproven(self.name, backend, device, dtype)
            answers.append(_Answer(backend, kernels, misfit, unproven))
        return answers

    def prefer(self, backend: str, device: torch.device, dtype: torch.dtype, *facts: object) -> Choice:
        """Same as `choose`, for the backend of a whole model or training: plain PyTorch runs if it cannot."""
        if backend == "auto":
            return self.choose("auto", device, dtype, *facts)
        reason = self.why_not(backend, device, dtype, *facts)
        return Choice(backend, {}) if reason is None else Choice("eager", {backend: reason})

    def why_not(self, backend: str, device: torch.device, dtype: torch.dtype, *facts: object) -> str | None:
        """The reason why a request for this backend would be an error, or None.

        Raises:
            ValueError: the backend is unknown.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}.")
        if backend == "eager":
            return None
        if backend not in self.kernels:
            return "this operation has no kernels of this backend."
        reason = why_not(backend, device, dtype)
        kernels = self.kernels[backend]
        return reason or kernels.misfit(device, dtype, False) or kernels.refuse(False, facts)


class _Answer(NamedTuple):
    """The checks of one backend's kernels that do not depend on the facts of the inputs."""

    backend: str
    kernels: Kernels
    misfit: str | None
    """The reason why `auto` cannot run them here."""
    unproven: str | None
    """The reason why they are not proven here, so that `auto` does not use them."""


_is_demanded: ContextVar[bool] = ContextVar("is_demanded", default=False)


def demanded(backend: str) -> AbstractContextManager[None]:
    """Let `auto` use kernels that are not proven on this GPU, if a model's backend is requested by name: many of its
    operations are called with `auto`.
    """
    # In compiled code these operations are plain PyTorch.
    return nullcontext() if backend in ("auto", "eager") or torch.compiler.is_compiling() else _demanded()


def present_demand() -> Callable[[], AbstractContextManager[None]]:
    """A function that makes contexts with the present state of `demanded`, for work that runs again later: backward
    runs in a thread of its own.
    """
    return _demanded if _is_demanded.get() else nullcontext


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
        triton, native: the kernels of these backends; None: no kernels.
    """
    kernels = {"triton": triton, "native": native}
    OPERATIONS[name] = Operation(name, {backend: entry for backend, entry in kernels.items() if entry is not None})
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
        return f"its kernels run on NVIDIA GPUs, but the tensors are on {device.type} (TRITON_INTERPRET=1 emulates)."
    return "the interpreter is for tests: request it by name." if is_auto else None


_capability = functools.cache(torch.cuda.get_device_capability)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; cached, because PyTorch needs longer to return it than to add two tensors."""
    # torch.compile warns about caches and calls this once. A device without index is the current one, which changes.
    is_uncached = device.index is None or torch.compiler.is_compiling()
    return (torch.cuda.get_device_capability if is_uncached else _capability)(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def transforms() -> list[str]:
    """Public names of the active function transforms and forward-mode differentiation, innermost first.

    Operators that define a gradient only fail there, or return no tangents.
    """
    # PyTorch has no public function for this. Functionalisation is a transform too, which our operators support.
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
    """Raise a BackendError inside `torch.func.vmap`, for functions whose sizes or host work depend on values."""
    if TRANSFORMS["Vmap"] in transforms():
        raise BackendError(f'{what} does not run inside torch.func.vmap, not even with backend="eager".')


def is_interpreting() -> bool:
    """Whether Triton's environment variable requests its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
