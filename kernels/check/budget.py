"""How far a kernel may be off: no more than twice as far as plain PyTorch in the same dtype."""

import math

import torch
from torch import Tensor

FACTOR = 2.0
"""Times the error of plain PyTorch, both root mean squares: of two largest errors, which is twice the other is a matter
of luck, so that those may differ by twice as much."""
ROUNDINGS, SUMS = 1.0, 4.0
"""On top, since plain PyTorch may by chance be exact: roundings of a typical number to the dtype, and to float32, in
which sums are made; of the largest number twice as many.
"""
NOTHING = 1e-12
"""A result that is smaller than the largest one by so much is zero but for rounding, and is held to that one's size."""


def share(ours: Tensor, theirs: Tensor, truth: Tensor, largest: float, factor: float = FACTOR) -> float:
    """The error of ours over what is allowed; above 1 is too much, infinite where ours is not finite.

    Args:
        ours, theirs: of one dtype; theirs is plain PyTorch's.
        truth: float64.
        largest: magnitude of all results of the problem.
        factor: times the error of plain PyTorch.
    """
    if truth.numel() == 0:
        return 0.0
    if not ours.isfinite().all():
        return math.inf
    error, budget = ((x.double() - truth).abs() for x in (ours, theirs))
    roundings = ROUNDINGS * torch.finfo(ours.dtype).eps + SUMS * torch.finfo(torch.float32).eps
    worst = 0.0
    for measure, times in ((_typical, 1), (_greatest, 2)):
        size = measure(truth)
        floor = roundings * (size if size > NOTHING * largest else largest)
        allowed = times * (factor * measure(budget) + floor)
        found = measure(error)
        worst = max(worst, found / allowed if allowed > 0 else 0.0 if found == 0 else math.inf)
    return worst


def magnitude(truths: list[Tensor]) -> float:
    """The largest number of several results."""
    return max((x.abs().max().item() for x in truths if x.is_floating_point() and x.numel()), default=0.0)


def _typical(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _greatest(x: Tensor) -> float:
    return x.abs().max().item()
