"""Which implementation of an operation runs, and why the others do not; and what all Triton kernels share.

Triton compiles a kernel anew for an integer that is 1 or a multiple of 16, to know it while compiling. For strides
something is won by it: wide loads. For sizes nothing is, and a training would stand still for seconds at the first
image whose width happens to be one: each kernel names its sizes in `SIZES`, which are not specialised.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from conddetr.kernels import native

BACKENDS = ("triton", "native", "eager")
"""In the order in which `auto` tries them. Triton runs on GPUs alone, so that on a CPU it is the native kernels."""


WITHOUT_NATIVE = ("triton", "eager")
"""What operations offer that have no native kernels."""


NATIVE_ALONE = ("native", "eager")
"""What operations offer that have no Triton kernels."""


REPLICAS = 256
"""Programs at most that add up one gradient of a vector: rows of its partial sums, and of the vectors' replicas.

A GPU of data centres has 132 to 148 multiprocessors: two programs of four warps on most of them, with loads of 24 KiB
each in flight, where one would leave memory idle. Each row costs its bytes twice, written and added up: at 256 channels
and three vectors 786 KB, where the gradient of 6,800 tokens moves 31 MB.
"""


HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the package is there; it is not imported for this."""


TRANSFORMS = {
    "Grad": "torch.func.grad (or vjp, jacrev)",
    "Jvp": "torch.func.jvp (or jacfwd)",
    "Vmap": "torch.func.vmap",
}
"""PyTorch's own names of function transforms → their public ones."""


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
    active = transforms()
    if active:
        return f'its operators do not support {active[0]}: use backend="eager".'
    if backend == "native":
        if is_auto and dtype == torch.float64:
            return "its float64 sines are as exact as float32's, for tests of gradients: ask for it by name."
        return native.why_not(device, dtype)
    if not HAS_TRITON:
        return "the package triton is not installed (pip install triton; Linux only)."
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
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
    # torch.compile warns of caches, and asks once.
    return (torch.cuda.get_device_capability if torch.compiler.is_compiling() else _capability)(device)


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


FIRST_DERIVATIVES = '{} has first derivatives only: for second ones use backend="eager".'


def once_differentiable(operator: str) -> None:
    """Let the gradient of an operator that computes gradients be an error, where PyTorch would go on without it.

    Args:
        operator: its name with the namespace, e.g. `conddetr::focal_loss_backward`.
    """

    def refuse(*_: object) -> None:
        raise BackendError(FIRST_DERIVATIVES.format(operator.removesuffix("_backward")))

    torch.library.register_autograd(operator, refuse)


def first_derivatives(name: str) -> Callable[[Callable], Callable]:
    """Decorates the `backward` of what is no operator, as `torch.autograd.function.once_differentiable`: its own
    derivatives are an error that says what to do.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx: object, *grads: torch.Tensor | None) -> tuple:
            with torch.no_grad():
                found = backward(ctx, *grads)
            differentiated = [grad for grad in grads if grad is not None and grad.requires_grad]
            if not (torch.is_grad_enabled() and differentiated):
                return found
            return _Refusal.apply(name, differentiated[0], *found)

        return run

    return decorate


class _Refusal(torch.autograd.Function):
    """Gradients as they are; their own derivatives are an error."""

    @staticmethod
    def forward(ctx: object, name: str, differentiated: torch.Tensor, *found: torch.Tensor | None) -> tuple:
        ctx.name = name
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in found)

    @staticmethod
    def backward(ctx: object, *_: object) -> None:
        raise BackendError(FIRST_DERIVATIVES.format(ctx.name))


def count_flops(operator: str, formula: Callable[..., int]) -> None:
    """Tell `torch.utils.flop_counter.FlopCounterMode` what an operator computes, which it takes for nothing else.

    Args:
        operator: its name with the namespace, e.g. `conddetr::conditional_attention`.
        formula: takes the operator's arguments, shapes in place of tensors, and `out_shape`; returns multiplications
            plus additions of what plain PyTorch would compute, however the kernel saves some.
    """
    if not HAS_TRITON:
        # The import says so, to all who never count.
        logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    namespace, name = operator.split("::")
    target = getattr(getattr(torch.ops, namespace), name)
    # Of PyTorch's own operators it may know some by now.
    if target not in flop_registry:
        register_flop_formula(target)(formula)


def define(operator: str, schema: str, launch: Callable, fake: Callable | None = None) -> None:
    """Make an operator of a function that launches Triton kernels, so that whoever counts or traces sees it.

    As `torch.library.custom_op`, without its checks in every call, which cost the host time.

    Args:
        operator: its name with the namespace, e.g. `conddetr::relu_dropout`.
        schema: arguments and results; what is changed in place is marked there.
        launch: computes it, from tensors on a GPU or, interpreted, on a CPU; the results share no memory with the
            arguments.
        fake: gives results of the same shapes and dtypes, from tensors without values. Default: there is none.
    """
    torch.library.define(operator, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(operator, ("cpu", "cuda"), on_their_device(launch))
    if fake is not None:
        torch.library.register_fake(operator, fake)


def call(operator: Callable, *arguments: object) -> object:
    """An operator's result. Where no gradient is recorded, PyTorch does not look in Python who would want one."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def on_their_device(launch: Callable) -> Callable:
    """A function that launches Triton kernels, run with the device of its first tensor as the current one.

    Triton launches on the current device, wherever the tensors are; native and PyTorch's operators look at them.
    """

    @functools.wraps(launch)
    def run(first: torch.Tensor, *others: object) -> object:
        with torch.cuda.device_of(first):
            return launch(first, *others)

    return run


def cdiv(dividend: int, divisor: int) -> int:
    """Quotient, rounded up. Triton's own costs the host more than an operator of PyTorch does."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a positive number; see `cdiv`."""
    return 1 << (number - 1).bit_length()


def is_interpreting() -> bool:
    """Whether Triton's interpreter was asked for, by its own environment variable."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def namespaces() -> list[str]:
    """Where operators are registered, under one schema each: Triton's always, the native ones where they are built."""
    return ["conddetr"] if native.NOT_LOADED else ["conddetr", "conddetr_native"]


def operators(backend: str) -> object:
    """`torch.ops.…` of a backend that is not eager."""
    return torch.ops.conddetr_native if backend == "native" else torch.ops.conddetr
