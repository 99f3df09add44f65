"""Error budget of a kernel: at most twice the error of plain PyTorch in the same dtype."""

import math

import torch
from torch import Tensor

FACTOR = 2.0
"""Allowed multiple of plain PyTorch's error, both as root mean squares; twice that for largest errors, which vary by
chance."""
ROUNDINGS, SUMS = 1.0, 4.0
"""Added to the budget, because plain PyTorch may be exact by chance: roundings of a typical number to the dtype, and to
float32, in which sums are accumulated. For the largest error, twice as many.
"""
NOTHING = 1e-12
"""A result below this share of the largest one is zero up to rounding; the largest one's size is then its scale."""


def share(ours: Tensor, plain: Tensor, truth: Tensor, largest: float, factor: float = FACTOR) -> float:
    """Return our error divided by the allowed one: too large above 1, infinite if ours is not finite.

    Args:
        ours: the kernel's result.
        plain: plain PyTorch's, in the same dtype.
        truth: the exact result, float64.
        largest: magnitude of all results of the problem.
        factor: allowed multiple of plain PyTorch's error.
    """
    if truth.numel() == 0:
        return 0.0
    if not ours.isfinite().all():
        return math.inf
    error, budget = ((x.double() - truth).abs() for x in (ours, plain))
    roundings = ROUNDINGS * torch.finfo(ours.dtype).eps + SUMS * torch.finfo(torch.float32).eps
    worst = 0.0
    for measure, times in ((_typical, 1), (_greatest, 2)):
        size = measure(truth)
        floor = roundings * (size if size > NOTHING * largest else largest)
        allowed = times * (factor * measure(budget) + floor)
        actual = measure(error)
        worst = max(worst, actual / allowed if allowed > 0 else 0.0 if actual == 0 else math.inf)
    return worst


def magnitude(truths: list[Tensor]) -> float:
    """The largest absolute value in several results."""
    return max((x.abs().max().item() for x in truths if x.is_floating_point() and x.numel()), default=0.0)


def _typical(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _greatest(x: Tensor) -> float:
    return x.abs().max().item()
