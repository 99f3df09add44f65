"""Base classes of problems: a title, command-line flags, and the steps from inputs to a result."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from harness import rates
from harness.check import usable
from harness.machine import DEVICE, Run
from harness.refusals import OURS
from harness.result import Result, Work
from harness.timing import measure

Inputs = TypeVar("Inputs")
Tensors = dict[str, Tensor]
Forward = Callable[..., Tensor | Tensors]


class Timed(ABC):
    """One size of an operation or model to be timed. Each benchmark's module has a subclass `Problem`."""

    seconds: ClassVar[float] = 60
    """Default time after which no problem starts."""
    why_not: ClassVar[str | None] = None
    """Why the benchmark does not run on this machine; None: it runs."""

    @property
    @abstractmethod
    def title(self) -> str:
        """One line for tables and result files."""

    @abstractmethod
    def measured(self, options: argparse.Namespace) -> Result:
        """Check all implementations, then time them."""

    @classmethod
    @abstractmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags that not all benchmarks have."""

    @classmethod
    @abstractmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every problem of these options, the most important first.

        Raises:
            RefusedError: an option does not apply here; says why.
        """


class Checked(Timed, Generic[Inputs]):
    """An operation whose implementations are compared with an exact answer."""

    peer_factor: ClassVar[float] = 10
    """Largest error of a peer, in errors of plain PyTorch."""

    @property
    def is_random(self) -> bool:
        """Whether dropout is on; the exact answer is without dropout."""
        return False

    @abstractmethod
    def make(self) -> Inputs:
        """Random inputs, the same for every call."""

    @abstractmethod
    def implementations(self, inputs: Inputs) -> dict[str, Run]:
        """Name → call, for everything that might compute the problem; the first is plain PyTorch."""

    def answer(self, run: Run) -> Tensors:
        """Outputs and gradients of a call, by name."""
        return run()

    @abstractmethod
    def exact(self, inputs: Inputs) -> Tensors:
        """The correct answer in float64, detached."""

    def work(self) -> Work | None:
        """Minimal work of the problem; None: unknown."""
        return None

    def measured(self, options: argparse.Namespace) -> Result:
        """Check all implementations, then time them."""
        # Without this, dynamo silently stops compiling after eight problems.
        torch.compiler.reset()
        inputs = self.make()
        runs, exact = self.implementations(inputs), self.exact(inputs)
        good, refused = usable(runs, self.answer, exact, self.is_random, self.peer_factor)
        return measure(self.title, good, options, self.work(), refused)


class Differentiated(Checked[Tensors]):
    """An operation with its gradients.

    Inputs have names. Names that begin with `grad_` are gradients of the outputs, in the outputs' order. The others
    are the operation's inputs; their gradients are computed where they require one.
    """

    @abstractmethod
    def forwards(self) -> dict[str, Forward]:
        """Name → function from inputs by name to one output, or to outputs by name; the first is plain PyTorch."""

    def exact_forward(self) -> Forward:
        """The function that computes the exact answer from float64 inputs."""
        return next(iter(self.forwards().values()))

    def compute(self, forward: Forward, tensors: Tensors) -> Tensors:
        """Outputs, and gradients of all inputs that require one."""
        inputs = {name: x for name, x in tensors.items() if not name.startswith("grad_")}
        out = forward(**inputs)
        outputs = out if isinstance(out, dict) else {"out": out}
        leaves = {name: x for name, x in inputs.items() if x.requires_grad}
        upstream = [x for name, x in tensors.items() if name.startswith("grad_")]
        return {**outputs, **gradients(outputs.values(), leaves, upstream)}

    def implementations(self, inputs: Tensors) -> dict[str, Run]:
        """All forwards with their gradients."""
        return {name: partial(self.compute, forward, inputs) for name, forward in self.forwards().items()}

    def exact(self, inputs: Tensors) -> Tensors:
        """Computed by `exact_forward`."""
        return detached(self.compute(self.exact_forward(), wide(inputs)))


@dataclass(frozen=True)
class PerImages(Timed):
    """One size: images per step, and a dtype."""

    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    """Default of `--dtypes`."""

    images: int
    dtype: torch.dtype

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of numbers of images and of dtypes."""
        parser.add_argument("--images", nargs="+", type=int, default=[16, 2] if DEVICE.type == "cuda" else [2, 8])
        parser.add_argument("--dtypes", nargs="+", default=list(cls.dtypes))

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every number of images in every dtype."""
        return [cls(images, getattr(torch, dtype)) for images, dtype in product(options.images, options.dtypes)]


def gradients(outputs: Iterable[Tensor], leaves: Tensors, upstream: list[Tensor]) -> Tensors:
    """Gradients of the leaves, by name; empty without leaves."""
    if not leaves:
        return {}
    return dict(zip(leaves, torch.autograd.grad(tuple(outputs), leaves.values(), upstream), strict=True))


def wide(tensors: Tensors) -> Tensors:
    """The same values in float64, as leaves."""
    return {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}


def detached(tensors: Tensors) -> Tensors:
    """The tensors without their autograd graph."""
    return {name: x.detach() for name, x in tensors.items()}


def beside_compiled(name: str, plain: Callable) -> dict[str, Callable]:
    """Plain PyTorch under this name, and torch.compile of it."""
    return {name: plain, "torch.compile of it": torch.compile(plain, dynamic=False)}


def ours(function: Callable, backends: Iterable[str]) -> dict[str, Callable]:
    """Our operation on each of these backends."""
    return {f"{OURS}, {backend}": partial(function, backend=backend) for backend in backends}


def against_pytorch(function: Callable, backends: Iterable[str], name: str = "PyTorch") -> dict[str, Callable]:
    """Our operation on `eager` under this name, torch.compile of that, and our operation on these backends."""
    return beside_compiled(name, partial(function, backend="eager")) | ours(function, backends)


def least(size: float, flops: float = 0, dtype: torch.dtype | None = None, needed: float | None = None) -> Work:
    """Minimal work of a problem that moves bytes and multiplies.

    Args:
        size: bytes that are read and written.
        flops: of its products as defined; 0: it has none.
        dtype: of the products.
        needed: FLOPs that the floor counts; None: all.
    """
    floors = {"bytes": size / rates.copy_bandwidth()}
    if flops:
        floors["products"] = (flops if needed is None else needed) / rates.product_rate(dtype)
    return Work(flops, size, floors)
