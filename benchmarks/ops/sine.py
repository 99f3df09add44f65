"""Sine embedding and λ ⊙ p_s against plain PyTorch and torch.compile of it, in one process, checked before timed.

python benchmarks/run.py sine --points 2400 --cudagraph        # the model's size, where launches dominate
"""

import argparse
from dataclasses import dataclass
from itertools import product
from typing import Self

import torch
from torch import Tensor

from conddetr.kernels import conditional_spatial_query, registry, sine_embedding
from harness.machine import DEVICE, Run, short_name
from harness.problem import Differentiated, Forward, Tensors, against_pytorch, least
from harness.result import Work

DIM = 256
CHECKED = 4096
"""Points compared with float64; points are independent, so these represent all."""
NAMES = {"conditional_spatial_query": "λ ⊙ p_s", "sine_embedding": "sine embedding"}


@dataclass(frozen=True)
class Problem(Differentiated):
    """One operation at one size."""

    operation: str
    points: int
    dtype: torch.dtype
    backward: bool

    seconds = 120

    @property
    def title(self) -> str:
        passes = "forward + backward" if self.backward else "forward"
        return f"{NAMES[self.operation]}, {self.points:,} points, {passes}, {short_name(self.dtype)}"

    def make(self) -> Tensors:
        """Random points [n, 2], λ [n, 256] for λ ⊙ p_s, and the gradient of the output [n, 256]."""
        generator = torch.Generator().manual_seed(0)
        made = {"points": torch.rand(self.points, 2, generator=generator)}
        if self.operation == "conditional_spatial_query":
            made["transform"] = torch.randn(self.points, DIM, generator=generator)
        made = {name: tensor.to(DEVICE, self.dtype).requires_grad_(self.backward) for name, tensor in made.items()}
        return made | {"grad_out": torch.randn(self.points, DIM, generator=generator).to(DEVICE, self.dtype)}

    def forwards(self) -> dict[str, Forward]:
        backends = [backend for backend in registry.BACKENDS if backend != "eager"]
        return against_pytorch(embed, backends, "eager")

    def answer(self, run: Run) -> Tensors:
        """Outputs and gradients of the checked points."""
        return {name: x[:CHECKED] for name, x in run().items()}

    def exact(self, inputs: Tensors) -> Tensors:
        """Exact outputs and gradients of the checked points."""
        checked = {name: x[:CHECKED].detach().requires_grad_(x.requires_grad) for name, x in inputs.items()}
        return super().exact(checked)

    def work(self) -> Work:
        """Bytes: inputs read and outputs written once in each pass; backward reads λ again."""
        has_transform = self.operation == "conditional_spatial_query"
        wide = 1 + has_transform + self.backward * (1 + 2 * has_transform)
        narrow = 1 + 2 * self.backward
        return least(self.points * (DIM * wide + 2 * narrow) * self.dtype.itemsize)

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        cuda = DEVICE.type == "cuda"
        # 2,400: eight images of 300 queries. A million points in plain PyTorch on a CPU: 10 s a call, 9 GiB.
        parser.add_argument("--points", nargs="+", type=int, default=[1_000_000 if cuda else 100_000, 2400])
        parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"] if cuda else ["float32"])

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Both operations on every number of points in every dtype; forward comes first."""
        sizes = product(options.dtypes, options.points, (False, True), NAMES)
        return [cls(operation, points, getattr(torch, dtype), backward) for dtype, points, backward, operation in sizes]


def embed(points: Tensor, transform: Tensor | None = None, *, backend: str) -> Tensor:
    """The output alone, [n, 256]."""
    if transform is None:
        return sine_embedding(points, DIM, backend=backend)
    return conditional_spatial_query(points, transform, backend=backend)
