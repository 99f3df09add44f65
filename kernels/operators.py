"""The operators behind the kernels, as PyTorch knows them: how they are registered, differentiated and called.

Triton's are `torch.ops.conddetr.…`, the native ones `torch.ops.conddetr_native.…`, under one schema each.

Triton compiles a kernel anew for an integer that is 1 or a multiple of 16, to know it while compiling. For strides
something is won by it: wide loads. For sizes nothing is, and a training would stand still for seconds at the first
image whose width happens to be one: each kernel names its sizes in `SIZES`, which are not specialised.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.function import FunctionCtx

from conddetr.kernels import native
from conddetr.kernels.registry import HAS_TRITON, BackendError

FIRST_DERIVATIVES = '{} has first derivatives only: for second ones use backend="eager".'


class Description(NamedTuple):
    """What PyTorch is told of an operator, whatever computes it."""

    fake: Callable | None
    """Gives results of the same shapes and dtypes, from tensors without values. None: nobody traces it."""
    backward: Callable | None
    """Takes the namespace's operators, `ctx` and the gradients of the results; gives those of the arguments."""
    setup: Callable | None
    """Saves in `ctx` what that needs, as `torch.library.register_autograd` has it."""
    flops: Callable[..., int] | None
    """As for `count_flops`."""
    is_gradient: bool
    """It computes gradients and has none itself: that is an error, where PyTorch would go on without."""


_DESCRIPTIONS: dict[str, Description] = {}
"""Name without a namespace → description."""


def register(
    name: str,
    schema: str | None = None,
    *,
    launch: Callable | None = None,
    fake: Callable | None = None,
    backward: Callable | None = None,
    setup: Callable | None = None,
    flops: Callable[..., int] | None = None,
    is_gradient: bool = False,
) -> None:
    """Make an operator known to PyTorch, so that whoever counts, traces or differentiates sees it: Triton's, and the
    native one where the compiled library has it too.

    As `torch.library.custom_op`, without its checks in every call, which cost the host time.

    Args:
        name: without a namespace, e.g. `focal_loss`.
        schema: arguments and results; what is changed in place is marked there. None: there are native kernels alone,
            and csrc/schemas.h has the schema.
        launch: computes it by Triton, from tensors on a GPU or, interpreted, on a CPU; the results share no memory with
            the arguments.
        fake, backward, setup, flops, is_gradient: see `Description`.
    """
    _DESCRIPTIONS[name] = Description(fake, backward, setup, flops, is_gradient)
    if schema is not None:
        torch.library.define(f"conddetr::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"conddetr::{name}", ("cpu", "cuda"), on_their_device(launch))
        describe("conddetr", name)
    if native.NOT_LOADED is None and hasattr(torch.ops.conddetr_native, name):
        describe("conddetr_native", name)


def describe(namespace: str, name: str) -> None:
    """Tell PyTorch of an operator that is there in a namespace what `register` was told."""
    found, operator = _DESCRIPTIONS[name], f"{namespace}::{name}"
    if found.fake is not None:
        torch.library.register_fake(operator, found.fake)
    if found.backward is not None:
        differentiate = functools.partial(found.backward, getattr(torch.ops, namespace))
        torch.library.register_autograd(operator, differentiate, setup_context=found.setup)
    elif found.is_gradient:
        torch.library.register_autograd(operator, functools.partial(_refuse, operator))
    if found.flops is not None:
        count_flops(operator, found.flops)


def launcher(package: str, function: str) -> Callable:
    """A function of an operation's Triton kernels, which are imported when it is called first.

    Args:
        package: of the operation, whose module `triton` has it.
        function: its name there.
    """

    @functools.cache
    def kernels() -> object:
        return importlib.import_module(f"{package}.triton")

    return lambda *inputs: getattr(kernels(), function)(*inputs)


def of(backend: str) -> object:
    """`torch.ops.…` of a backend that is not eager."""
    return torch.ops.conddetr_native if backend == "native" else torch.ops.conddetr


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


def _refuse(operator: str, *_: object) -> None:
    raise BackendError(FIRST_DERIVATIVES.format(operator.removesuffix("_backward")))


def first_derivatives(name: str) -> Callable[[Callable], Callable]:
    """Decorates the `backward` of what is no operator, as `torch.autograd.function.once_differentiable`: its own
    derivatives are an error that says what to do.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx: FunctionCtx, *grads: torch.Tensor | None) -> tuple:
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
    def forward(ctx: FunctionCtx, name: str, differentiated: torch.Tensor, *found: torch.Tensor | None) -> tuple:
        ctx.name = name
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in found)

    @staticmethod
    def backward(ctx: FunctionCtx, *_: object) -> None:
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
