"""One row of the table: an implementation of an operation in one dtype, on all its problems."""

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
"""Duration of each problem's timing; on a CPU the minimum number of rounds may take longer."""
LEAST = 0.95
"""A speed-up below it counts as slower than PyTorch; between it and 1 the difference may be noise."""


@dataclass(frozen=True)
class Row:
    """An implementation and the problems to check it on."""

    operation: str
    backend: str
    dtype: torch.dtype
    problems: tuple[Problem, ...]
    is_timed: bool = True
    """Whether it is timed. If `auto` never chooses the kernel in this dtype, only correct numbers count."""

    @property
    def title(self) -> str:
        """Name that the progress display shows."""
        return f"{self.operation}, {self.backend}, {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        """Name of the dtype without `torch.`."""
        return str(self.dtype).removeprefix("torch.")

    def verdict(self, refused: str, error: float | None, speedup: float | None) -> Verdict:
        """The row's entry in the record."""
        return Verdict(self.operation, self.backend, self.dtype_name, refused, error, speedup)


def judge(row: Row, device: torch.device, tell: Callable[[int], None]) -> Verdict:
    """Verify all problems of a row, then time those of the model.

    Args:
        row: the implementation and its problems.
        device: where it runs.
        tell: takes the number of verified problems.

    Raises:
        BackendError: the implementation supports none of the problems; the message has the reason.
    """
    errors: list[float] = []
    wrong, misfit = "", None
    for number, problem in enumerate(row.problems):
        tell(number)
        try:
            finding = verify(problem, row.backend, row.dtype, device)
        except BackendError as error:
            # It may refuse some shapes; refusing all of them is an error.
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
    """The reason to refuse the kernel (or none), its error, and its speed-up."""
    problems = [problem for problem in row.problems if problem.is_model and row.is_timed]
    # A slow result is measured again, longer, by its minimum: other processes on the machine only add time.
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
    """Geometric mean over the problems that the implementation supports."""
    seconds = factor * SECONDS[device.type]
    speedups = []
    for problem in problems:
        try:
            ours, fastest = clock(problem, row.backend, row.dtype, device, seconds, typical)
        except BackendError:
            continue
        speedups.append(fastest / ours)
    return geometric_mean(speedups) if speedups else None
