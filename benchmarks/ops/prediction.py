"""Boxes from offsets and reference points, and their gradient, against plain PyTorch and torch.compile of it.

python benchmarks/run.py prediction
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import predicted_boxes
from harness.machine import DEVICE, copy_bandwidth
from harness.timing import OURS, Result, Work, measure, run_losses, usable

LAYERS, QUERIES = 6, 300
Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One size: images per step, and the dtype of the offsets."""

    images: int
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        size = f"{LAYERS} layers × {self.images} images × {QUERIES} queries"
        return f"predicted boxes, {size}, forward + backward, {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> tuple[Tensor, Tensor]:
        """Offsets [L, B, Q, 4] and reference points [Q, 2]."""
        generator = torch.Generator().manual_seed(0)
        offsets = torch.randn(LAYERS, self.images, QUERIES, 4, generator=generator)
        points = 0.05 + 0.9 * torch.rand(QUERIES, 2, generator=generator)
        return tuple(x.to(DEVICE, self.dtype).requires_grad_() for x in (offsets, points))

    def work(self) -> Work:
        """Offsets read, boxes written; boxes and their gradient read, that of the offsets written; points are few."""
        size = 5 * LAYERS * self.images * QUERIES * 4 * self.dtype.itemsize
        return Work(0, size, {"bytes": size / copy_bandwidth()})


def compute(predict: Predict, offsets: Tensor, points: Tensor) -> dict[str, Tensor]:
    """Boxes, and gradients of the sum of their squares."""
    boxes = predict(offsets, points)
    of_offsets, of_points = torch.autograd.grad(boxes, (offsets, points), boxes.detach())
    return {"boxes": boxes.detach(), "offsets": of_offsets, "points": of_points}


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, then time them."""
    torch.compiler.reset()
    tensors = problem.make()
    plain = partial(predicted_boxes, backend="eager")
    ways = {"PyTorch": plain, "torch.compile of it": torch.compile(plain, dynamic=False)}
    ways[f"{OURS}, triton"] = partial(predicted_boxes, backend="triton")
    runs = {name: partial(compute, way, *tensors) for name, way in ways.items()}
    exact = compute(plain, *(x.detach().double().requires_grad_() for x in tensors))
    good, refused = usable(runs, lambda call: call(), exact, False)
    return measure(problem.title, good, options, problem.work(), refused)


if __name__ == "__main__":
    run_losses("prediction", __doc__.splitlines()[0], Problem, run, ["float32"])
