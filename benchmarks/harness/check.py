"""Check answers before timing: wrong ones are not timed."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from harness.machine import Run, is_null_gpu
from harness.refusals import OURS, UNCHECKED, WRONG, RefusedError, refusing


def usable(
    runs: dict[str, Run],
    answer: Callable[[Run], dict[str, Tensor]],
    exact: dict[str, Tensor],
    is_random: bool,
    peer_factor: float = 10,
) -> tuple[dict[str, Run], dict[str, str]]:
    """Run each implementation once; return the correct ones, and the reason against each of the others.

    Our error may be at most twice that of plain PyTorch, a peer's `peer_factor` times: a peer that computes something
    else has a far larger error, and its rounding is not judged here. If plain PyTorch itself fails, nothing is correct.

    Args:
        runs: implementation → call; the first is plain PyTorch, which sets the error budget.
        answer: call → its outputs and gradients by name.
        exact: the same in float64, without dropout.
        is_random: dropout is on. Answers then differ, but their mean squared errors must agree.
        peer_factor: largest error of a peer, in errors of plain PyTorch.
    """
    good, refused, budget = {}, {}, {}
    reference = next(iter(runs))
    for name, run in runs.items():
        with warnings.catch_warnings(record=True) as raised, refusing(name, refused, raised=raised):
            warnings.simplefilter("always")
            outputs = answer(run)
            errors = {key: _error(outputs[key], exact[key]) for key in exact}
            if name == reference:
                budget = errors
            elif reference in refused:
                raise RefusedError(f"{UNCHECKED}{reference}, which it is compared with, is refused")
            factor = 2 if name.startswith(OURS) else peer_factor
            for key, error in errors.items():
                floor = 4 * torch.finfo(outputs[key].dtype).eps * exact[key].abs().max().item()
                limit = factor * budget[key] + floor
                is_right = _is_dropout(error, budget[key]) if is_random else error <= limit
                if not (is_right or is_null_gpu()):
                    raise RefusedError(f"{WRONG}error of {key} {error:.2e}, {reference} {budget[key]:.2e}")
            good[name] = run
    return good, refused


def _error(output: Tensor, exact: Tensor) -> float:
    """Root mean square: the ratio of two largest errors is random."""
    return (output.detach().double() - exact).square().mean().sqrt().item()


def _is_dropout(error: float, budget: float) -> bool:
    return 0.8 * budget <= error <= 1.25 * budget
