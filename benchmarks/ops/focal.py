"""Focal loss and its gradient against torchvision's and torch.compile of it, checked before timed.

python benchmarks/run.py focal

All start from the class of each prediction; who needs a one-hot tensor makes it within its time.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from conddetr.kernels import focal_loss, registry
from harness.machine import DEVICE, copy_bandwidth
from harness.timing import OURS, Result, Work, measure, run_losses, usable

LAYERS, QUERIES, CLASSES, OBJECTS = 6, 300, 91, 7
ALPHA, GAMMA = 0.25, 2.0
PEER_FACTOR = 1000
"""How many times torchvision's error a peer may have: on a CPU torch.compile adds up the losses with a relative
error of 3e-6 to 9e-6, torchvision's is 1e-7. That is no wrong answer, and leaving it out would flatter ours."""


@dataclass(frozen=True)
class Problem:
    """One size: images per step, and the dtype of the logits."""

    images: int
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        size = f"{LAYERS} layers × {self.images} images × {QUERIES} queries × {CLASSES} classes"
        return f"focal loss, {size}, forward + backward, {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> tuple[Tensor, Tensor]:
        """Logits [L, B, Q, K] around the focal prior, and classes [L, B, Q], -1 where there is no object."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(LAYERS, self.images, QUERIES, CLASSES, generator=generator) - 4.6
        target = torch.randint(CLASSES, logits.shape[:-1], generator=generator)
        target[:, :, OBJECTS:] = -1
        return logits.to(DEVICE, self.dtype).requires_grad_(), target.to(DEVICE)

    def work(self) -> Work:
        """Logits read once in each pass, their gradient written once."""
        size = 3 * LAYERS * self.images * QUERIES * CLASSES * self.dtype.itemsize
        return Work(0, size, {"bytes": size / copy_bandwidth()})


def by_torchvision(logits: Tensor, target: Tensor) -> Tensor:
    """[L]: as the official code does it, on a one-hot tensor with one class too many, cut off."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    one_hot = torch.zeros((*logits.shape[:-1], CLASSES + 1), dtype=logits.dtype, device=logits.device)
    one_hot.scatter_(-1, torch.where(target < 0, CLASSES, target).unsqueeze(-1), 1)
    return sigmoid_focal_loss(logits, one_hot[..., :-1], ALPHA, GAMMA).flatten(1).sum(1)


def compute(forward: Callable[..., Tensor], logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Loss [L] and gradient."""
    loss = forward(logits, target)
    return {"loss": loss, "gradient": torch.autograd.grad(loss.sum(), logits)[0]}


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, then time them."""
    torch.compiler.reset()
    logits, target = problem.make()
    forwards = {"torchvision": by_torchvision, "torch.compile of it": torch.compile(by_torchvision, dynamic=False)}
    for backend in registry.BACKENDS:
        forwards[f"{OURS}, {backend}"] = partial(focal_loss, alpha=ALPHA, gamma=GAMMA, backend=backend)
    runs = {name: partial(compute, forward, logits, target) for name, forward in forwards.items()}
    exact = compute(by_torchvision, logits.detach().double().requires_grad_(), target)
    good, refused = usable(
        runs, lambda call: call(), {name: x.detach() for name, x in exact.items()}, False, PEER_FACTOR
    )
    return measure(problem.title, good, options, problem.work(), refused)


if __name__ == "__main__":
    run_losses(
        "focal",
        __doc__.splitlines()[0],
        Problem,
        run,
        ["float32", "bfloat16"] if DEVICE.type == "cuda" else ["float32"],
    )
