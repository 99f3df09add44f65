"""Right answers only are timed."""

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
    """Run each once: those that compute the right thing, and the reason against each that does not.

    Right is an error of at most twice that of plain PyTorch for ours, `peer_factor` times for a peer: that it computes
    something else would show by far more, and how well it rounds is not asked here. Where plain PyTorch itself fails,
    nothing is right.

    Args:
        runs: implementation → call; the first is plain PyTorch, which sets the error budget.
        answer: call → its outputs and gradients by name.
        exact: the same in float64, without dropout.
        is_random: dropout is on. No two answers are then equal, but their mean squares of error must be.
        peer_factor: how many times the error of plain PyTorch a peer may have.
    """
    good, refused, budget = {}, {}, {}
    reference = next(iter(runs))
    for name, run in runs.items():
        with warnings.catch_warnings(record=True) as raised, refusing(name, refused, raised=raised):
            warnings.simplefilter("always")
            found = answer(run)
            errors = {key: _error(found[key], exact[key]) for key in exact}
            if name == reference:
                budget = errors
            elif reference in refused:
                raise RefusedError(f"{UNCHECKED}{reference}, which it is held to, is refused")
            factor = 2 if name.startswith(OURS) else peer_factor
            for key, error in errors.items():
                floor = 4 * torch.finfo(found[key].dtype).eps * exact[key].abs().max().item()
                limit = factor * budget[key] + floor
                is_right = _is_dropout(error, budget[key]) if is_random else error <= limit
                if not (is_right or is_null_gpu()):
                    raise RefusedError(f"{WRONG}error of {key} {error:.2e}, {reference} {budget[key]:.2e}")
            good[name] = run
    return good, refused


def _error(found: Tensor, exact: Tensor) -> float:
    """Root mean square: which of two largest errors is twice the other is chance."""
    return (found.detach().double() - exact).square().mean().sqrt().item()


def _is_dropout(error: float, budget: float) -> bool:
    return 0.8 * budget <= error <= 1.25 * budget
