"""Class error and cardinality error of all layers, against plain PyTorch and torch.compile of it.

python benchmarks/run.py errors
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import prediction_errors
from harness.machine import DEVICE, copy_bandwidth
from harness.timing import OURS, Result, Work, measure, run_losses, usable

LAYERS, QUERIES, CLASSES, OBJECTS = 6, 300, 91, 7


@dataclass(frozen=True)
class Problem:
    """One size: images per step, and the dtype of the logits."""

    images: int
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        size = f"{LAYERS} layers × {self.images} images × {QUERIES} queries × {CLASSES} classes"
        return f"errors of predictions, {size}, {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits [L, B, Q, K], the object of each prediction [L, B, Q], classes [B, N] and counts [B] of objects.

        Half of the matched predictions of the last layer have the right class.
        """
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(LAYERS, self.images, QUERIES, CLASSES, generator=generator)
        labels = torch.randint(CLASSES, (self.images, OBJECTS), generator=generator)
        assignment = torch.full(logits.shape[:-1], -1)
        assignment[..., :OBJECTS] = torch.arange(OBJECTS)
        for number in range(0, OBJECTS, 2):
            logits[-1, torch.arange(self.images), number, labels[:, number]] = 10.0
        counts = torch.full((self.images,), OBJECTS, dtype=torch.int32)
        return logits.to(DEVICE, self.dtype), assignment.to(DEVICE), labels.to(DEVICE), counts.to(DEVICE)

    def work(self) -> Work:
        """Logits and assignment read once; objects and errors are few."""
        size = LAYERS * self.images * QUERIES * (CLASSES * self.dtype.itemsize + torch.int64.itemsize)
        return Work(0, size, {"bytes": size / copy_bandwidth()})


def exact_answer(logits: Tensor, assignment: Tensor, labels: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """By the best class of every prediction, in float64."""
    best, is_matched = logits.argmax(-1), assignment[-1] >= 0
    is_wrong = best[-1] != labels.gather(1, assignment[-1].clamp(min=0))
    difference = ((best != CLASSES - 1).sum(-1) - counts).abs()
    return {"class": 100 * is_wrong[is_matched].double().mean(), "cardinality": difference.double().mean(1)}


def found_by(call: Callable[[], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What a call gives, by name."""
    return dict(zip(("class", "cardinality"), call(), strict=True))


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, then time them."""
    torch.compiler.reset()
    tensors = problem.make()
    plain = partial(prediction_errors, backend="eager")
    ways = {"PyTorch": plain, "torch.compile of it": torch.compile(plain, dynamic=False)}
    ways[f"{OURS}, triton"] = partial(prediction_errors, backend="triton")
    runs = {name: partial(way, *tensors) for name, way in ways.items()}
    good, refused = usable(runs, found_by, exact_answer(*tensors), is_random=False)
    return measure(problem.title, good, options, problem.work(), refused)


if __name__ == "__main__":
    run_losses("errors", __doc__.splitlines()[0], Problem, run, ["float32"])
