"""Dropout after ReLU and before a residual sum, with gradients, against plain PyTorch and torch.compile of it."""

import argparse
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Self

import torch
from torch import Tensor

from conddetr.kernels import dropout_add, relu_dropout
from harness.machine import DEVICE, short_name
from harness.problem import Differentiated, Forward, Tensors, against_pytorch, least
from harness.result import Work

P = 0.1
WIDTHS = {"relu_dropout": 2048, "dropout_add": 256}
"""Channels in a model: of the feed-forward network, and of a residual branch."""


@dataclass(frozen=True)
class Problem(Differentiated):
    """One size: what is computed, and from what."""

    operation: str
    tokens: int
    dtype: torch.dtype

    is_random = True

    @property
    def title(self) -> str:
        size = f"{self.tokens:,} × {WIDTHS[self.operation]}"
        return f"{self.operation}, {size}, forward + backward, {short_name(self.dtype)}"

    def make(self) -> Tensors:
        """Random inputs and the gradient of the output, [tokens, channels]."""
        generator = torch.Generator().manual_seed(0)
        names = ("x", "of_out") if self.operation == "relu_dropout" else ("x", "residual", "of_out")
        made = {name: torch.randn(self.tokens, WIDTHS[self.operation], generator=generator) for name in names}
        return {name: tensor.to(DEVICE, self.dtype).requires_grad_(name != "of_out") for name, tensor in made.items()}

    def forwards(self) -> dict[str, Forward]:
        backends = ("triton", "native") if self.operation == "relu_dropout" else ("native",)
        return against_pytorch(partial(drop, p=P), backends, "eager")

    def exact_forward(self) -> Forward:
        """Without dropout."""
        return partial(drop, p=0.0, backend="eager")

    def exact(self, inputs: Tensors) -> Tensors:
        """Of the trunk's gradient there is no error to compare: it is the one above, bit by bit."""
        found = super().exact(inputs)
        found.pop("residual", None)
        return found

    def work(self) -> Work:
        """Bytes: inputs and output once; in backward both gradients, and after ReLU the output again."""
        return least(5 * self.tokens * WIDTHS[self.operation] * self.dtype.itemsize)

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        # Two images of 480×640, and of 800×1066.
        parser.add_argument("--tokens", nargs="+", type=int, default=[600, 1700])
        parser.add_argument("--dtypes", nargs="+", default=["float32"])

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Both operations on all numbers of tokens in all dtypes."""
        sizes = product(options.dtypes, options.tokens, WIDTHS)
        return [cls(operation, tokens, getattr(torch, dtype)) for dtype, tokens, operation in sizes]


def drop(x: Tensor, residual: Tensor | None = None, *, p: float, backend: str) -> Tensor:
    """The output alone; without a residual ReLU comes first."""
    return relu_dropout(x, p, backend) if residual is None else dropout_add(x, residual, p, backend)
