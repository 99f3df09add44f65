"""W (λ ⊙ p_s) + b, the conditional spatial query with its projection, against the product and `F.linear` one by one.

Forward and backward; torch.compile of the two is there as well.

python benchmarks/run.py query
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import spatial_query
from harness.machine import DEVICE, copy_bandwidth, product_rate
from harness.timing import OURS, Result, Work, measure, run_losses, usable

QUERIES, CHANNELS = 300, 256
LEAVES = ("transform", "embedding", "weight", "bias")


@dataclass(frozen=True)
class Problem:
    """One size: images of a step, and the dtype."""

    images: int
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        size = f"{self.images}×{QUERIES}×{CHANNELS}"
        return f"projected spatial query, {size}, forward + backward, {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> dict[str, Tensor]:
        """λ of every image, p_s of all, weight and bias, and the gradient of the result."""
        generator = torch.Generator().manual_seed(0)
        tokens = (self.images, QUERIES, CHANNELS)
        shapes = dict(zip(LEAVES, (tokens, tokens[1:], (CHANNELS, CHANNELS), (CHANNELS,)), strict=True))
        made = {name: torch.randn(shape, generator=generator) for name, shape in {**shapes, "upstream": tokens}.items()}
        return {name: x.to(DEVICE, self.dtype).requires_grad_(name in LEAVES) for name, x in made.items()}

    def work(self) -> Work:
        """Three products. λ read, the result written; in backward its gradient and λ read, the gradient of λ written.
        What all images share is small beside them.
        """
        numbers = self.images * QUERIES * CHANNELS
        flops, size = 3 * 2 * numbers * CHANNELS, 5 * numbers * self.dtype.itemsize
        return Work(flops, size, {"bytes": size / copy_bandwidth(), "products": flops / product_rate(self.dtype)})


def compute(forward: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Result and gradients."""
    leaves = [tensors[name] for name in LEAVES]
    out = forward(*leaves)
    return {"out": out, **dict(zip(LEAVES, torch.autograd.grad(out, leaves, tensors["upstream"]), strict=True))}


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, then time them."""
    torch.compiler.reset()
    tensors = problem.make()
    plain = partial(spatial_query, backend="eager")
    forwards = {"product, then F.linear": plain, "torch.compile of it": torch.compile(plain, dynamic=False)}
    forwards[f"{OURS}, triton"] = partial(spatial_query, backend="triton")
    runs = {name: partial(compute, forward, tensors) for name, forward in forwards.items()}
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    exact = {name: x.detach() for name, x in compute(plain, wide).items()}
    good, refused = usable(runs, lambda call: call(), exact, False)
    return measure(problem.title, good, options, problem.work(), refused)


if __name__ == "__main__":
    run_losses("query", __doc__.splitlines()[0], Problem, run, ["bfloat16"])
