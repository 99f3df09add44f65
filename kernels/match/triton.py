"""Batched linear assignment: one program solves one problem, all problems in one launch.

Shortest augmenting paths (Crouse 2016), vectorised over queries: objects are added one by one, and for each a
Dijkstra search over the queries finds the cheapest way to make room. Distances and dual variables are float64.

Details:
- Only the dual variables of the queries are kept. An object in the tree was reached through the query that it held,
  where its reduced cost is zero; this gives the object's dual variable.
- A query's state is one integer, its `key` = (object that holds it + 1) · BLOCK + its index. The smallest key among
  the nearest queries is that of a free one, if any; it also gives the object where the search continues.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.common.launch import next_power_of_2

SIZES = ("batch", "capacity", "queries")
"""Not specialised (`operators.py` says why)."""


@triton.jit
def scan_costs(cost, count, queries, lane):
    """The replacement for NaN and infinity: more than the span of all sums of finite costs."""
    largest = tl.zeros(lane.shape, tl.float64)
    for row in range(0, count):
        value = tl.abs(tl.load(cost + row * queries + lane, mask=lane < queries, other=0.0))
        # NaN is not less than infinity either.
        largest = tl.maximum(largest, tl.where(value < float("inf"), value, 0.0).to(tl.float64))
    largest = tl.max(largest, axis=0)
    return 2.0 * (count + 1) * tl.where(largest > 0.0, largest, 1.0)


@triton.jit
def finite_cost(value, worst):
    """float64; NaN and infinity become the worst cost, -inf its opposite."""
    replaced = tl.where(value == float("-inf"), -worst, worst)
    return tl.where(tl.abs(value) < float("inf"), value.to(tl.float64), replaced)


@triton.jit
def pick(values, lane, index):
    """values[index], from registers."""
    return tl.sum(tl.where(lane == index, values, tl.zeros_like(values)), axis=0)


@triton.jit(do_not_specialize=SIZES)
def match_kernel(cost, counts, assignment, batch, capacity, queries, BLOCK: tl.constexpr):
    """assignment[problem, query] = object or -1; cost [problems, capacity, queries]."""
    problem = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < queries
    cost += problem * capacity * queries
    # Clamped: a wrong count never reads outside, and never searches without end.
    count = tl.minimum(tl.load(counts + problem % batch), tl.minimum(capacity, queries))
    worst = scan_costs(cost, count, queries, lane)
    potential = tl.zeros((BLOCK,), tl.float64)
    keys = lane
    for row in range(0, count):
        distance = tl.full((BLOCK,), float("inf"), tl.float64)
        origin = tl.zeros((BLOCK,), tl.int32)
        is_open = inside
        # The search starts at the new object and ends at a query that is free.
        key = (row + 1) * BLOCK
        nearest = tl.full((), 0.0, tl.float64)
        while key >= BLOCK:
            holder, query = key // BLOCK - 1, key % BLOCK
            costs = cost + holder * queries
            reduced = finite_cost(tl.load(costs + lane, mask=inside, other=0.0), worst) - potential
            # An object that holds a query is reached at reduced cost zero; the new one has none, and starts at zero.
            through = finite_cost(tl.load(costs + query), worst) - pick(potential, lane, query)
            step = reduced + tl.where(holder == row, 0.0, nearest - through)
            is_nearer = is_open & (step < distance)
            distance = tl.where(is_nearer, step, distance)
            origin = tl.where(is_nearer, key, origin)
            nearest = tl.min(tl.where(is_open, distance, float("inf")), axis=0)
            key = tl.min(tl.where(is_open & (distance == nearest), keys, 2147483647), axis=0)
            is_open = is_open & (lane != key % BLOCK)
        potential = tl.where(inside & (is_open == 0), potential + distance - nearest, potential)
        # Back along the path: every object on it moves to the query that it was reached from.
        free, mover = key, -1
        while mover != row:
            source = pick(origin, lane, free % BLOCK)
            mover = source // BLOCK - 1
            keys = tl.where(lane == free % BLOCK, (mover + 1) * BLOCK + lane, keys)
            free = source
    tl.store(assignment + problem * queries + lane, (keys // BLOCK - 1).to(tl.int64), mask=inside)


def launch(queries: int) -> dict[str, int]:
    """Lanes and warps for a number of queries."""
    block = max(32, next_power_of_2(queries))
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 128))}


def forward(cost: Tensor, counts: Tensor) -> Tensor:
    """Contiguous cost [..., B, N, Q] float32 and counts [B] int32 -> [..., B, Q] int64."""
    *leading, capacity, queries = cost.shape
    assignment = cost.new_empty((*leading, queries), dtype=torch.int64)
    problems = assignment.numel() // queries
    match_kernel[(problems,)](cost, counts, assignment, len(counts), capacity, queries, **launch(queries))
    return assignment
