"""Whether an implementation is right in a problem: numbers, gradients, what is dropped, bits, and where it writes."""

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
"""Of PyTorch's generators, before every run: for what draws its own numbers."""
DEVIATIONS = 5
"""Standard deviations of a binomial share that are taken for chance: one check in two million goes beyond."""
FEW = 64
"""Elements of which two draws may be the same by chance."""


@dataclass(frozen=True)
class Finding:
    """Of one problem."""

    error: float
    """Over its budget."""
    wrong: str | None
    """The reason against the implementation; None: it is right."""


def verify(problem: Problem, backend: str, dtype: torch.dtype, device: torch.device) -> Finding:
    """Compare an implementation with plain PyTorch in float64, on the same inputs.

    Raises:
        BackendError: the implementation does not take these inputs; says why.
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
    """The same, which draws the same numbers each time."""

    def seeded(inputs: Inputs) -> Sequence[Tensor]:
        torch.manual_seed(SEED)
        return run(inputs)

    return seeded


def _kept(problem: Problem, inputs: Inputs, backend: str) -> tuple[Tensor | None, str | None]:
    """What the implementation leaves of these inputs, and what is wrong with it."""
    dropout = problem.dropout
    if dropout is None:
        return None, None
    torch.manual_seed(SEED)
    kept, raised = attempt(lambda: dropout.kept(inputs, backend).clone())
    if raised is not None:
        return None, raised
    dropped, count = (~kept).double().mean().item(), kept.numel()
    # Rounded up to whole elements: of one, all or none is dropped.
    bound = DEVIATIONS * math.sqrt(dropout.p * (1 - dropout.p) / count) + 1 / count
    if abs(dropped - dropout.p) > bound:
        return kept, f"drops {dropped:.2%} where it should drop {dropout.p:.2%}"
    torch.manual_seed(SEED + 1)
    other = {name: x + 1 if name == "seed" else x for name, x in inputs.items()}
    if count >= FEW and torch.equal(kept, dropout.kept(other, backend)):
        return kept, "drops the same whatever the seed is"
    return kept, None


def _reference(problem: Problem, kept: Tensor | None) -> Run:
    """Plain PyTorch, which drops what the implementation drops."""
    if kept is None:
        return partial(problem.run, backend="eager")
    return lambda inputs: problem.dropout.run(inputs, kept)


def _upstream(problem: Problem, reference: Run, inputs: Inputs) -> list[Tensor]:
    """Gradients of the results from above; zeros where a rounding may decide what the derivative is."""
    upstream = upstream_of(evaluate(_seeded(reference), inputs, ()).outputs)
    if problem.jump is not None:
        [jump] = problem.jump(widened(inputs))
        roundings = 4 * torch.finfo(upstream[0].dtype).eps
        upstream[0].mul_(jump.abs() > roundings * jump.abs().max())
    return upstream


def _twice(problem: Problem, backend: str, inputs: Inputs, upstream: list[Tensor]) -> tuple[Results | None, str | None]:
    """What the implementation gives, or None, and what is wrong with how it gives it."""
    found = []
    for _ in range(2):
        made, raised = attempt(lambda: _guarded(problem, backend, inputs, upstream))
        if raised is not None:
            return None, raised
        results, outside = made
        if outside is not None:
            return results, outside
        found.append(results)
    return found[0], _difference(*found)


def _guarded(problem: Problem, backend: str, inputs: Inputs, upstream: list[Tensor]) -> tuple[Results, str | None]:
    """What the implementation gives, and where it wrote that it must not."""
    guards = Guards()
    placed = guards.place(inputs)
    slopes = guards.place({f"gradient of result {i + 1}": slope for i, slope in enumerate(upstream)})
    with guards.watching():
        run = _seeded(partial(problem.run, backend=backend))
        found = evaluate(run, placed, problem.gradients, list(slopes.values()))
    return found, guards.violation()


def _difference(first: Results, second: Results) -> str | None:
    """The first bits that differ between two runs."""
    for (name, x), y in zip(first.named().items(), second.named().values(), strict=True):
        if not torch.equal(_bits(x), _bits(y)):
            return f"{name} differs between two runs on the same inputs"
    return None


def _bits(x: Tensor) -> Tensor:
    """As numbers that are equal if their bits are, NaN too."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(kinds[x.element_size()])


def _compare(problem: Problem, ours: Results, plain: Results, exact: Results) -> tuple[float, str | None]:
    """The worst error over its budget, and what it is of where it is too large."""
    truths = exact.named()
    largest = budget.magnitude(list(truths.values()))
    worst, wrong = 0.0, None
    for (name, x), y in zip(ours.named().items(), plain.named().values(), strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return math.inf, f"{name} is {tuple(x.shape)} {x.dtype}, not {tuple(y.shape)} {y.dtype}"
        if not x.is_floating_point():
            if not torch.equal(x, truths[name].to(x.dtype)):
                return math.inf, f"{name} is not exactly plain PyTorch's"
            continue
        factor = problem.allowances.get(name.removeprefix("gradient of "), budget.FACTOR)
        found = budget.share(x, y, truths[name], largest, factor)
        if found > 1 and wrong is None:
            far = "is not finite" if found == math.inf else f"is {found:.3g} times as far off as it may be"
            wrong = f"{name} {far}"
        worst = max(worst, found)
    return worst, wrong
