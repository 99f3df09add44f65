"""Pooling behind the stem, which needs no gradient, against plain PyTorch and torch.compile of it.

python benchmarks/run.py pool
"""

import argparse
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import max_pool
from harness.machine import DEVICE, copy_bandwidth
from harness.timing import OURS, Result, Work, measure, run_losses, usable

CHANNELS, HEIGHT, WIDTH = 64, 400, 533
"""Behind the stem of a ResNet, of images of 800×1066."""


@dataclass(frozen=True)
class Problem:
    """One size: images per step, and the dtype of the map."""

    images: int
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        size = f"{self.images}×{CHANNELS}×{HEIGHT}×{WIDTH}"
        return f"pooling, {size}, {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> Tensor:
        """A map in channels-last."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.images, CHANNELS, HEIGHT, WIDTH, generator=generator).to(DEVICE, self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def work(self) -> Work:
        """The map read and a quarter of it written, once."""
        size = self.images * CHANNELS * HEIGHT * WIDTH * self.dtype.itemsize * 5 / 4
        return Work(0, size, {"bytes": size / copy_bandwidth()})


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, then time them."""
    torch.compiler.reset()
    x = problem.make()
    plain = partial(max_pool, backend="eager")
    ways = {"PyTorch": plain, "torch.compile of it": torch.compile(plain, dynamic=False)}
    ways[f"{OURS}, triton"] = partial(max_pool, backend="triton")
    runs = {name: partial(way, x) for name, way in ways.items()}
    exact = {"out": torch.nn.functional.max_pool2d(x.double(), 3, 2, 1)}
    good, refused = usable(runs, lambda call: {"out": call()}, exact, False)
    return measure(problem.title, good, options, problem.work(), refused)


if __name__ == "__main__":
    run_losses("pool", __doc__.splitlines()[0], Problem, run, ["float32"])
