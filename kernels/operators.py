"""PyTorch operators behind the kernels: how they are registered, differentiated and called.

Triton's operators are `torch.ops.conddetr.…`, the native ones `torch.ops.conddetr_native.…`, with one schema for both.

Triton recompiles a kernel for an integer argument that is 1 or a multiple of 16. For strides this specialisation allows
wide loads. For sizes it gains nothing, and a training run would pause for seconds at the first image of such a width.
Each kernel therefore lists its sizes in `SIZES`, which are not specialised.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from conddetr.kernels import native
from conddetr.kernels.registry import HAS_TRITON, BackendError

FIRST_DERIVATIVES = '{} has first derivatives only: for second ones use backend="eager".'


class Description(NamedTuple):
    """The registrations of an operator that are the same for all its implementations."""

    fake: Callable | None
    """Returns results of the same shapes and dtypes, from tensors without values. None: it is never traced."""
    backward: Callable | None
    """Takes the namespace's operators, `ctx` and the gradients of the results; returns those of the arguments."""
    setup: Callable | None
    """Saves in `ctx` the inputs of `backward`, see `torch.library.register_autograd`."""
    flops: Callable[..., int] | None
    """See `count_flops`."""
    is_gradient: bool
    """It computes gradients and has none itself. Differentiating it raises an error; PyTorch would return none."""


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
    """Register an operator with PyTorch, so that it can be counted, traced and differentiated.

    This registers Triton's operator, and the native one if the compiled library has it. It is like
    `torch.library.custom_op`, without the checks in every call that cost the host time.

    Args:
        name: without a namespace, e.g. `focal_loss`.
        schema: arguments and results, with marks on tensors that are changed in place. None: only native kernels exist,
            with the schema in csrc/schemas.h.
        launch: runs the Triton kernels on tensors on a GPU or, interpreted, on a CPU; the results share no memory with
            the arguments.
        fake, backward, setup, flops, is_gradient: see `Description`.
    """
    _DESCRIPTIONS[name] = Description(fake, backward, setup, flops, is_gradient)
    if schema is not None:
        if launch is None:
            raise ValueError(f"{name}: a schema needs `launch`.")
        torch.library.define(f"conddetr::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"conddetr::{name}", ("cpu", "cuda"), on_their_device(launch))
        describe("conddetr", name)
    if native.NOT_LOADED is None and hasattr(torch.ops.conddetr_native, name):
        describe("conddetr_native", name)


def describe(namespace: str, name: str) -> None:
    """Apply the description from `register` to an operator that a namespace defines."""
    description, operator = _DESCRIPTIONS[name], f"{namespace}::{name}"
    if description.fake is not None:
        torch.library.register_fake(operator, description.fake)
    if description.backward is not None:
        differentiate = functools.partial(description.backward, getattr(torch.ops, namespace))
        torch.library.register_autograd(operator, differentiate, setup_context=description.setup)
    elif description.is_gradient:
        torch.library.register_autograd(operator, functools.partial(_refuse, operator))
    if description.flops is not None:
        count_flops(operator, description.flops)


def launcher(package: str, function: str) -> Callable:
    """A function that runs an operation's Triton code, which is imported on the first call.

    Args:
        package: of the operation; the function is in its module `triton`.
        function: its name there.
    """

    @functools.cache
    def kernels() -> object:
        return importlib.import_module(f"{package}.triton")

    return lambda *inputs: getattr(kernels(), function)(*inputs)


def of(backend: str) -> Any:
    """The namespace `torch.ops.…` of a backend other than eager."""
    return torch.ops.conddetr_native if backend == "native" else torch.ops.conddetr


def call(operator: Callable, *arguments: object) -> Any:
    """Call an operator. Without recording of gradients, PyTorch's autograd layer in Python is skipped."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def on_their_device(launch: Callable) -> Callable:
    """Wrap a function that launches Triton kernels: the device of its first tensor becomes the current device.

    Triton launches on the current device, wherever the tensors are; native and PyTorch operators use their device.
    """

    @functools.wraps(launch)
    def run(first: torch.Tensor, *others: object) -> object:
        with torch.cuda.device_of(first):
            return launch(first, *others)

    return run


def _refuse(operator: str, *_: object) -> None:
    raise BackendError(FIRST_DERIVATIVES.format(operator.removesuffix("_backward")))


def first_derivatives(name: str) -> Callable[[Callable], Callable]:
    """Decorator for the `backward` of an autograd function, like `torch.autograd.function.once_differentiable`: its
    derivatives raise an error that names a backend which has them.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: torch.Tensor | None) -> tuple:
            with torch.no_grad():
                gradients = backward(ctx, *grads)
            differentiated = [grad for grad in grads if grad is not None and grad.requires_grad]
            if not (torch.is_grad_enabled() and differentiated):
                return gradients
            return _Refusal.apply(name, differentiated[0], *gradients)

        return run

    return decorate


class _Refusal(torch.autograd.Function):
    """Returns gradients unchanged; differentiating them raises an error."""

    @staticmethod
    def forward(ctx: Any, name: str, differentiated: torch.Tensor, *gradients: torch.Tensor | None) -> tuple:
        ctx.name = name
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: object) -> None:
        raise BackendError(FIRST_DERIVATIVES.format(ctx.name))


def count_flops(operator: str, formula: Callable[..., int]) -> None:
    """Register an operator's FLOPs with `torch.utils.flop_counter.FlopCounterMode`, which otherwise counts none.

    Args:
        operator: its name with the namespace, e.g. `conddetr::conditional_attention`.
        formula: takes the operator's arguments, with shapes instead of tensors, and `out_shape`; returns the
            multiplications plus additions of plain PyTorch, even if the kernel needs fewer.
    """
    if not HAS_TRITON:
        # The import logs a warning about missing Triton, even if nothing is counted.
        logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    namespace, name = operator.split("::")
    target = getattr(getattr(torch.ops, namespace), name)
    # A PyTorch operator may be registered already.
    if target not in flop_registry:
        register_flop_formula(target)(formula)
