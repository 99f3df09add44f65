"""Shared part of the benchmarks `dropout` and `relu_dropout`."""

import argparse
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Self

import torch

from harness.machine import DEVICE, short_name
from harness.problem import Differentiated, Tensors, least
from harness.result import Work

P = 0.1


@dataclass(frozen=True)
class DropoutProblem(Differentiated):
    """One size of an operation with dropout, with gradients: tokens, and a dtype."""

    operation: ClassVar[str]
    channels: ClassVar[int]
    """Channels in a model."""
    leaves: ClassVar[tuple[str, ...]]
    """The operation's inputs, all of one shape."""

    tokens: int
    dtype: torch.dtype

    is_random = True

    @property
    def title(self) -> str:
        size = f"{self.tokens:,} × {self.channels}"
        return f"{self.operation}, {size}, forward + backward, {short_name(self.dtype)}"

    def make(self) -> Tensors:
        """Random inputs and the gradient of the output, [tokens, channels]."""
        generator = torch.Generator().manual_seed(0)
        names = (*self.leaves, "grad_out")
        made = {name: torch.randn(self.tokens, self.channels, generator=generator) for name in names}
        return {name: x.to(DEVICE, self.dtype).requires_grad_(name in self.leaves) for name, x in made.items()}

    def work(self) -> Work:
        """Bytes: inputs and output once; in backward both gradients, and after ReLU the output again."""
        return least(5 * self.tokens * self.channels * self.dtype.itemsize)

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        # Two images of 480×640, and of 800×1066.
        parser.add_argument("--tokens", nargs="+", type=int, default=[600, 1700])
        parser.add_argument("--dtypes", nargs="+", default=["float32"])

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every number of tokens in every dtype."""
        return [cls(tokens, getattr(torch, dtype)) for dtype, tokens in product(options.dtypes, options.tokens)]
