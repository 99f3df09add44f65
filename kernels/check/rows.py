"""One row of the table: an implementation of an operation in one dtype, in all its problems."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean, median

import torch

from conddetr.kernels.check.attempt import attempt
from conddetr.kernels.check.clock import Typical, clock
from conddetr.kernels.check.problem import Problem
from conddetr.kernels.check.verify import verify
from conddetr.kernels.records import Verdict
from conddetr.kernels.registry import BackendError

SECONDS = {"cpu": 0.2, "cuda": 0.1}
"""That each problem is timed for; few rounds take longer on a CPU."""
LEAST = 0.95
"""A speed-up below it is slower than PyTorch; in between it may be noise."""


@dataclass(frozen=True)
class Row:
    """What is asked."""

    operation: str
    backend: str
    dtype: torch.dtype
    problems: tuple[Problem, ...]
    is_timed: bool = True
    """Not where `auto` leaves the dtype to plain PyTorch whatever is found: there right numbers are all that counts."""

    @property
    def title(self) -> str:
        """For a person who waits."""
        return f"{self.operation}, {self.backend}, {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        """Without the package."""
        return str(self.dtype).removeprefix("torch.")

    def verdict(self, refused: str, error: float | None, speedup: float | None) -> Verdict:
        """The answer."""
        return Verdict(self.operation, self.backend, self.dtype_name, refused, error, speedup)


def judge(row: Row, device: torch.device, tell: Callable[[int], None]) -> Verdict:
    """Verify all problems of a row, then time those of the model.

    Args:
        row: what is asked.
        device: where.
        tell: takes how many problems are verified.

    Raises:
        BackendError: the implementation takes none of the problems; says why.
    """
    errors: list[float] = []
    wrong, misfit = "", None
    for number, problem in enumerate(row.problems):
        tell(number)
        try:
            finding = verify(problem, row.backend, row.dtype, device)
        except BackendError as error:
            # Of some shapes alone, unless there is nothing else.
            misfit = misfit or error
            continue
        errors.append(finding.error)
        if finding.wrong is not None and not wrong:
            wrong = f"{problem.title}: {finding.wrong}."
    if not errors:
        raise misfit or BackendError("there is no problem in this dtype.")
    error = max(errors)
    if wrong:
        return row.verdict(wrong, error if math.isfinite(error) else None, None)
    return row.verdict(*_speed(row, device, error))


def _speed(row: Row, device: torch.device, error: float) -> tuple[str, float, float | None]:
    """What is to be said against it, the error, and the speed-up."""
    problems = [problem for problem in row.problems if problem.is_model and row.is_timed]
    # What is slow by chance is measured again, longer, and by the fastest: others on the machine only take time away.
    for factor, typical in ((1, median), (3, min)):
        speedup, raised = attempt(partial(_speedup, problems, row, device, factor, typical))
        if raised is not None:
            return f"{raised}.", error, None
        if speedup is None or speedup >= 1:
            break
    if speedup is not None and speedup < LEAST:
        return f"it is slower than PyTorch here: {speedup:.2f}× its speed.", error, speedup
    return "", error, speedup


def _speedup(problems: list[Problem], row: Row, device: torch.device, factor: int, typical: Typical) -> float | None:
    """Geometric mean over the problems that the implementation takes."""
    seconds = factor * SECONDS[device.type]
    found = []
    for problem in problems:
        try:
            ours, theirs = clock(problem, row.backend, row.dtype, device, seconds, typical)
        except BackendError:
            continue
        found.append(theirs / ours)
    return geometric_mean(found) if found else None
