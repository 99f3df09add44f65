"""Verifies an implementation on a problem: values, gradients, dropout, equal bits, and the memory it writes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from conddetr.kernels.check import budget
from conddetr.kernels.check.attempt import attempt
from conddetr.kernels.check.guards import Guards
from conddetr.kernels.check.inputs import Inputs, Maker, widened
from conddetr.kernels.check.isolation import poisoned, products
from conddetr.kernels.check.problem import Problem, Results, Run, evaluate, upstream_of

SEED = 3
"""Seed of PyTorch's generators before every run, for operations that sample their own numbers."""
DEVIATIONS = 5
"""Standard deviations of a binomial share that count as chance: one check in two million exceeds them."""
FEW = 64
"""With fewer elements, two samples may be equal by chance."""


@dataclass(frozen=True)
class Finding:
    """Result of one problem."""

    error: float
    """Relative to its budget."""
    wrong: str | None
    """The implementation's fault; None: it is correct."""


def verify(problem: Problem, backend: str, dtype: torch.dtype, device: torch.device) -> Finding:
    """Compare an implementation with plain PyTorch in float64, on the same inputs.

    Raises:
        BackendError: the implementation does not support these inputs; the message has the reason.
    """
    inputs = problem.make(Maker(device, dtype))
    with poisoned(), products("tf32" if problem.is_tf32 else "ieee"):
        kept, wrong = _kept(problem, inputs, backend)
        if wrong is not None:
            return Finding(math.inf, wrong)
        reference = _reference(problem, kept)
        upstream = _upstream(problem, reference, inputs)
        ours, wrong = _twice(problem, backend, inputs, upstream)
        if ours is None:
            return Finding(math.inf, wrong)
        plain = evaluate(_seeded(reference), inputs, problem.gradients, upstream)
        if problem.judge is not None:
            wrong = wrong or problem.judge(inputs, ours.outputs, plain.outputs)
            return Finding(math.inf if wrong else 0.0, wrong)
        slopes = [slope.double() for slope in upstream]
        exact = evaluate(_seeded(problem.truth or reference), widened(inputs), problem.gradients, slopes)
    error, far = _compare(problem, ours, plain, exact)
    return Finding(error, wrong or far)


def _seeded(run: Run) -> Run:
    """The same run, seeded, so that it samples the same numbers every time."""

    def seeded(inputs: Inputs) -> Sequence[Tensor]:
        torch.manual_seed(SEED)
        return run(inputs)

    return seeded


def _kept(problem: Problem, inputs: Inputs, backend: str) -> tuple[Tensor | None, str | None]:
    """The elements that the implementation keeps, and the fault if these are wrong."""
    dropout = problem.dropout
    if dropout is None:
        return None, None
    torch.manual_seed(SEED)
    kept, raised = attempt(lambda: dropout.kept(inputs, backend).clone())
    if raised is not None:
        return None, raised
    dropped, count = (~kept).double().mean().item(), kept.numel()
    # Allow for whole elements: a single one is dropped or kept.
    bound = DEVIATIONS * math.sqrt(dropout.p * (1 - dropout.p) / count) + 1 / count
    if abs(dropped - dropout.p) > bound:
        return kept, f"drops {dropped:.2%} of the elements, expected {dropout.p:.2%}"
    torch.manual_seed(SEED + 1)
    reseeded = {name: x + 1 if name == "seed" else x for name, x in inputs.items()}
    if count >= FEW and torch.equal(kept, dropout.kept(reseeded, backend)):
        return kept, "drops the same elements for every seed"
    return kept, None


def _reference(problem: Problem, kept: Tensor | None) -> Run:
    """Plain PyTorch, which drops the same elements as the implementation."""
    if kept is None:
        return partial(problem.run, backend="eager")
    return lambda inputs: problem.dropout.run(inputs, kept)


def _upstream(problem: Problem, reference: Run, inputs: Inputs) -> list[Tensor]:
    """Upstream gradients of the results; zeros where rounding may decide the derivative."""
    upstream = upstream_of(evaluate(_seeded(reference), inputs, ()).outputs)
    if problem.jump is not None:
        [jump] = problem.jump(widened(inputs))
        roundings = 4 * torch.finfo(upstream[0].dtype).eps
        upstream[0].mul_(jump.abs() > roundings * jump.abs().max())
    return upstream


def _twice(problem: Problem, backend: str, inputs: Inputs, upstream: list[Tensor]) -> tuple[Results | None, str | None]:
    """The implementation's results, or None, and its fault: an error, a write outside, or bits that differ."""
    runs = []
    for _ in range(2):
        made, raised = attempt(lambda: _guarded(problem, backend, inputs, upstream))
        if raised is not None:
            return None, raised
        results, outside = made
        if outside is not None:
            return results, outside
        runs.append(results)
    return runs[0], _difference(*runs)


def _guarded(problem: Problem, backend: str, inputs: Inputs, upstream: list[Tensor]) -> tuple[Results, str | None]:
    """The implementation's results, and its first forbidden write."""
    guards = Guards()
    placed = guards.place(inputs)
    slopes = guards.place({f"gradient of result {i + 1}": slope for i, slope in enumerate(upstream)})
    with guards.watching():
        run = _seeded(partial(problem.run, backend=backend))
        results = evaluate(run, placed, problem.gradients, list(slopes.values()))
    return results, guards.violation()


def _difference(first: Results, second: Results) -> str | None:
    """The first bits that differ between two runs."""
    for (name, x), y in zip(first.named().items(), second.named().values(), strict=True):
        if not torch.equal(_bits(x), _bits(y)):
            return f"{name} differs between two runs on the same inputs"
    return None


def _bits(x: Tensor) -> Tensor:
    """The bits as integers, so that NaNs compare too."""
    dtypes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(dtypes[x.element_size()])


def _compare(problem: Problem, ours: Results, plain: Results, exact: Results) -> tuple[float, str | None]:
    """The worst error relative to its budget, and the first result that exceeds it."""
    truths = exact.named()
    largest = budget.magnitude(list(truths.values()))
    worst, wrong = 0.0, None
    for (name, x), y in zip(ours.named().items(), plain.named().values(), strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return math.inf, f"{name}: expected {tuple(y.shape)} {y.dtype}, got {tuple(x.shape)} {x.dtype}"
        if not x.is_floating_point():
            if not torch.equal(x, truths[name].to(x.dtype)):
                return math.inf, f"{name} differs from plain PyTorch's"
            continue
        factor = problem.allowances.get(name.removeprefix("gradient of "), budget.FACTOR)
        error = budget.share(x, y, truths[name], largest, factor)
        if error > 1 and wrong is None:
            far = "is not finite" if error == math.inf else f"is off by {error:.3g} times its error budget"
            wrong = f"{name} {far}"
        worst = max(worst, error)
    return worst, wrong
