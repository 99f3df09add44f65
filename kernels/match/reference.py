"""Linear assignment by scipy, one problem after the other on the host: the reference for every kernel.

Source: Crouse, On implementing 2D rectangular assignment algorithms, IEEE TAES 2016, which scipy implements.
"""

import numpy as np
import torch
from torch import Tensor

from conddetr.kernels import registry


def rank_non_finite(cost: np.ndarray) -> np.ndarray:
    """[n, Q] float64 with NaN and infinity replaced by a cost that is chosen only if nothing else is left.

    It exceeds the span of all sums of finite costs, and costs no precision where it is not needed. -inf becomes its
    negative, which is chosen first.
    """
    cost = cost.astype(np.float64)
    is_finite = np.isfinite(cost)
    if is_finite.all():
        return cost
    largest = np.abs(cost[is_finite]).max(initial=0.0)
    worst = 2 * (len(cost) + 1) * (largest if largest > 0 else 1.0)
    return np.nan_to_num(cost, nan=worst, posinf=worst, neginf=-worst)


def linear_assignment(cost: Tensor, counts: Tensor) -> Tensor:
    """cost [..., B, N, Q] and counts [B] -> [..., B, Q] int64, on the device of `cost`; see `op.py`."""
    # Imported here because it takes 0.4 s.
    from scipy.optimize import linear_sum_assignment

    *leading, capacity, queries = cost.shape
    costs = cost.detach().cpu().reshape(-1, capacity, queries)
    # Inside transforms of torch.func a tensor has values, but no memory to share.
    problems = costs.numpy() if not registry.transforms() else np.array(costs.tolist())
    numbers = counts.tolist()
    assignment = np.full((len(problems), queries), -1, dtype=np.int64)
    for number, problem in enumerate(problems):
        index, query = linear_sum_assignment(rank_non_finite(problem[: numbers[number % len(numbers)]]))
        assignment[number, query] = index
    return torch.from_numpy(assignment).reshape(*leading, queries).to(cost.device)
