"""Linear assignment: the public function, its checks, and the operator behind the kernel. There is no gradient."""

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.match import reference

MAX_QUERIES = 4096
"""More do not fit into the registers of one block."""


@torch.no_grad()
def linear_assignment(cost: Tensor, counts: Tensor, backend: str = "auto") -> Tensor:
    """The assignment of least total cost, for every problem in a batch (DETR, section 3.1).

    Every object gets a separate query. If there are more objects than queries, `eager` gives each query an object, and
    the other backends raise an error. The optimum is exact, in float64 sums of the given costs. If several assignments
    are equally good, backends may differ.

    NaN and +inf are chosen only if there is no alternative, -inf is chosen first, so every input has a valid
    assignment.

    Args:
        cost: [..., B, N, Q] float32 (scipy takes any floating dtype), of object n and query q.
        counts: [B] int32, how many of the N are objects, on the device of `cost`; the others are not read.
        backend: `auto`, `triton` (all problems in one launch, no wait for the device; float32, at most 4096 queries),
            `native` (on CPUs) or `eager` (scipy, on the host). All but `eager` take no more objects than queries.

    Returns:
        [..., B, Q] int64, the object that each query gets, -1 for none.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a count is out of range; names the values. On a GPU
            `counts` is clamped instead, because reading it would block the host.
        RuntimeError: the requested backend cannot run here, or the call is inside `torch.func.vmap`; says why.
    """
    registry.refuse_vmap("linear_assignment, which takes leading dimensions itself,")
    _check(cost, counts)
    if cost.numel() == 0:
        return torch.full((*cost.shape[:-2], cost.shape[-1]), -1, dtype=torch.int64, device=cost.device)
    choice = OPERATION.choose(backend, cost.device, cost.dtype, cost.shape[-1], cost.shape[-2], counts)
    paths.note("linear_assignment", choice.backend, choice.refused)
    if choice.backend == "eager":
        return reference.linear_assignment(cost, counts)
    return operators.of(choice.backend).linear_assignment(cost.contiguous(), counts.contiguous())


def _why_not(queries: int, capacity: int = 0, counts: Tensor | None = None) -> str | None:
    most = 0 if counts is None or capacity <= queries else _most(counts)
    if most <= queries:
        return None
    return f"its kernel takes at most as many objects as queries ({queries}), got {most}."


def _why_not_triton(queries: int, capacity: int = 0, counts: Tensor | None = None) -> str | None:
    if queries > MAX_QUERIES:
        return f"its kernel takes at most {MAX_QUERIES} queries, got {queries}."
    return _why_not(queries, capacity, counts)


OPERATION = registry.declare(
    "linear_assignment",
    triton=registry.Kernels(dtypes=(torch.float32,), why_not=_why_not_triton),
    native=registry.Kernels(devices=("cpu",), why_not=_why_not),
)
"""`why_not` takes the number of queries; for a batch also the largest number of objects per image, and counts."""


def _check(cost: Tensor, counts: Tensor) -> None:
    if cost.dim() < 3 or not cost.is_floating_point():
        raise ValueError(f"cost: expected [..., B, N, Q], floating, got {tuple(cost.shape)} {cost.dtype}.")
    if tuple(counts.shape) != cost.shape[-3:-2] or counts.dtype != torch.int32:
        raise ValueError(
            f"counts: expected {tuple(cost.shape[-3:-2])} torch.int32, got {tuple(counts.shape)} {counts.dtype}."
        )
    if counts.device != cost.device:
        raise ValueError(f"counts: expected device {cost.device} like cost, got {counts.device}.")
    if min(_values(counts), default=0) < 0 or _most(counts) > cost.shape[-2]:
        raise ValueError(f"counts: expected from 0 to N = {cost.shape[-2]} objects, got {counts.tolist()}.")


def _values(counts: Tensor) -> list[int]:
    """The counts, if reading them does not block the host; else none."""
    return counts.tolist() if counts.device.type == "cpu" and not torch.compiler.is_compiling() else []


def _most(counts: Tensor) -> int:
    return max(_values(counts), default=0)


def _fake(cost: Tensor, counts: Tensor) -> Tensor:
    return cost.new_empty((*cost.shape[:-2], cost.shape[-1]), dtype=torch.int64)


operators.register(
    "linear_assignment",
    "(Tensor cost, Tensor counts) -> Tensor",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake,
)
