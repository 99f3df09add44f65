"""Checks kernels on the device that runs them: values, gradients, dropout, equal bits, memory accesses, then speed.

`conddetr check` prints the report of `examine`. `check` returns the record alone, which `backend="auto"` follows.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conddetr.kernels import records, registry
from conddetr.kernels.check.cases import IMAGES, problems
from conddetr.kernels.check.compiling import compile_kernels
from conddetr.kernels.check.isolation import isolated
from conddetr.kernels.check.rows import Row, judge
from conddetr.kernels.records import Record, Verdict
from conddetr.kernels.registry import FLOATS

if TYPE_CHECKING:
    from conddetr.kernels.check.tuning import Tuning

TUNED = ("conditional_attention", "triton")
"""Operation and implementation whose launch settings are tuned."""
NO_MEMORY = "the GPU has no memory left for the check."
Progress = Callable[[str, int, int], None]
"""Takes the name of the current step, the number of finished steps and their total."""


@dataclass(frozen=True)
class Report:
    """Result of a check, with everything that is printed."""

    device: torch.device
    record: Record
    unavailable: dict[str, list[str]]
    """Reason why an implementation cannot run here → titles of its rows."""
    file: Path | None
    """Path of the record; None: it could not be written, or the GPU was full and no record is kept."""
    seconds: float
    """Duration of the check, without compilation."""
    compilation: float | None
    """Seconds of the compilation before the check; None: nothing is compiled on this device."""
    tuning: "Tuning | None" = None
    """The tuned launch settings; None: tuning was not requested."""


@dataclass
class _Outcome:
    """Results of the rows so far."""

    verdicts: list[Verdict] = field(default_factory=list)
    unavailable: dict[str, list[str]] = field(default_factory=dict)
    full: list[Verdict] = field(default_factory=list)
    """Refusals because the GPU had no memory left; they hold while this process runs."""


def check(
    device: str | torch.device,
    *,
    short: bool = False,
    tune: bool = False,
    dtypes: Sequence[torch.dtype] | None = None,
    progress: Progress | None = None,
) -> Record:
    """Check every kernel on a device and save the record.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.
        short: check only the sizes of the model.
        tune: first try launch settings on a GPU and keep the fastest in the record; otherwise those of an earlier
            record stay.
        dtypes: the dtypes to check, some of float32, bfloat16 and float16; default: all three.
        progress: is called with each step.

    Returns:
        The record, which is saved. An interrupted check saves none, nor does a check that runs out of GPU memory.

    Raises:
        ValueError: no such device, a dtype that is not checked, or nothing to tune on the device.
    """
    return examine(device, short=short, tune=tune, dtypes=dtypes, progress=progress).record


def examine(
    device: str | torch.device,
    *,
    short: bool = False,
    tune: bool = False,
    dtypes: Sequence[torch.dtype] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Like `check`, but returns the full report."""
    device, dtypes = _device(device), _dtypes(dtypes)
    if tune:
        _check_tunable(device)
    tell = progress or (lambda step, done, total: None)
    rows = _rows(device, dtypes, short)
    with isolated(device):
        lost = None if _computes(device) else f"plain PyTorch computes wrong sums on {device}."
        compilation = None
        if device.type == "cuda" and lost is None:
            compilation = compile_kernels(device, short, dtypes, tell, tune)
        begin = time.perf_counter()
        tuning = None
        if tune:
            tuning, lost = _tune(device, dtypes, tell, lost)
            outcome = _judge_tuned(rows, device, tell, lost, tuning)
        else:
            outcome = _judge_all(rows, device, tell, lost)
        seconds = time.perf_counter() - begin
        # Before the context ends: restoring the state may fail on a GPU that failed.
        record = _record(device, outcome.verdicts, short, None if tuning is None else tuning.settings())
        if outcome.full:
            file = None
            adopted = {verdict.key: verdict for verdict in (*outcome.full, *record.verdicts)}
            records.adopt(device, replace(record, verdicts=tuple(adopted.values())))
        else:
            file = records.save(device, record)
    return Report(device, record, outcome.unavailable, file, seconds, compilation, tuning)


def _check_tunable(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"tune: only GPU kernels have launch settings, and the device is {device}.")
    if not registry.HAS_TRITON:
        raise ValueError("tune: only Triton's kernels have launch settings, and the package triton is not installed.")


def _tune(
    device: torch.device, dtypes: tuple[torch.dtype, ...], tell: Progress, lost: str | None
) -> tuple["Tuning", str | None]:
    """The tuned settings, and the reason if nothing can be checked afterwards."""
    # Its kernels need Triton.
    from conddetr.kernels.check import tuning

    if lost is not None:
        result = tuning.Tuning()
    else:
        result = tuning.tune(device, dtypes, tell)
        lost = _stopped(device, "launch settings of attention")
    if lost is not None:
        result.refuse(lost)
    return result, lost


def _judge_tuned(rows: list[Row], device: torch.device, tell: Progress, lost: str | None, tuning: "Tuning") -> _Outcome:
    """Judge all rows with the tuned settings; without any of them if one fails at some size of attention."""
    from conddetr.kernels.check.tuning import in_effect

    settings = tuning.settings()
    with in_effect(device, settings):
        outcome = _judge_all(rows, device, tell, lost)
    refused = [x for x in outcome.verdicts if (x.operation, x.backend) == TUNED and x.refused]
    if settings and refused:
        tuning.refuse(f"with the fastest settings, {TUNED[0]} is refused in {refused[0].dtype}: {refused[0].refused}")
        kept = [x for x in outcome.verdicts if (x.operation, x.backend) != TUNED]
        lost = lost or _stopped(device, "launch settings of attention")
        with in_effect(device, {}):
            again = _judge_all([row for row in rows if (row.operation, row.backend) == TUNED], device, tell, lost)
        outcome.verdicts[:] = [*kept, *again.verdicts]
    return outcome


def _device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}.") from error
    if device.type not in IMAGES:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {str(device)!r}: other devices have no kernels.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: got {str(device)!r}, but PyTorch sees no GPU here.")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return torch.device("cpu")


def _dtypes(dtypes: Sequence[torch.dtype] | None) -> tuple[torch.dtype, ...]:
    for dtype in dtypes or ():
        if dtype not in FLOATS:
            raise ValueError(f"dtypes: expected some of {', '.join(map(str, FLOATS))}, got {dtype}.")
    return FLOATS if dtypes is None else tuple(dict.fromkeys(dtypes))


def _rows(device: torch.device, dtypes: tuple[torch.dtype, ...], short: bool) -> list[Row]:
    """Every implementation in every dtype, grouped by operation."""
    wanted = [
        problem
        for problem in problems(IMAGES[device.type])
        if (problem.is_model or not short) and (device.type == "cuda" or not problem.is_tf32)
    ]
    rows = []
    for operation in dict.fromkeys(problem.operation for problem in wanted):
        for backend in backends(operation):
            for dtype in dtypes:
                chosen = tuple(x for x in wanted if x.operation == operation and dtype in x.dtypes)
                is_timed = dtype in registry.OPERATIONS[operation].kernels[backend].auto_dtypes
                if chosen:
                    rows.append(Row(operation, backend, dtype, chosen, is_timed))
    return rows


def backends(operation: str) -> tuple[str, ...]:
    """An operation's backends that are kernels."""
    return tuple(backend for backend in registry.OPERATIONS[operation].backends if backend != "eager")


def _computes(device: torch.device) -> bool:
    """Whether a device computes a sum correctly; a broken or simulated one does not."""
    numbers = torch.arange(1000, dtype=torch.float64, device=device)
    return (numbers * numbers).sum().item() == 332_833_500


def _judge_all(rows: list[Row], device: torch.device, tell: Progress, lost: str | None) -> _Outcome:
    """`lost`: the reason if nothing can be checked."""
    outcome = _Outcome()
    total, done = sum(len(row.problems) for row in rows), 0
    for row in rows:
        tell(row.title, done, total)
        reason = _why_not(row, device)
        if reason is None and lost is not None:
            outcome.verdicts.append(row.verdict(lost, None, None))
        elif reason is None:
            try:
                tell_row = partial(_tell_row, tell, row.title, done, total)
                outcome.verdicts.append(judge(row, device, tell_row))
            except registry.BackendError as error:
                reason = str(error)
            except torch.OutOfMemoryError:
                reason = NO_MEMORY
                outcome.full.append(row.verdict(NO_MEMORY, None, None))
            lost = _stopped(device, row.title)
        if reason is not None:
            outcome.unavailable.setdefault(reason, []).append(row.title)
        done += len(row.problems)
    tell("done", total, total)
    return outcome


def _tell_row(tell: Progress, title: str, before: int, total: int, verified: int) -> None:
    tell(title, before + verified, total)


def _why_not(row: Row, device: torch.device) -> str | None:
    """The reason why an implementation cannot run here with any shape."""
    if row.backend == "triton" and device.type == "cpu":
        return "Triton's kernels run on GPUs."
    return registry.OPERATIONS[row.operation].why_not(row.backend, device, row.dtype)


def _stopped(device: torch.device, title: str) -> str | None:
    """The reason why nothing can be checked after this: an error from which a GPU does not recover in this process."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
        # The caller needs the memory.
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return f"not checked, because the GPU failed at {title}: {str(error).splitlines()[0]}"
    return None


def _record(device: torch.device, verdicts: list[Verdict], short: bool, tuned: dict[str, Any] | None = None) -> Record:
    """The new record. A short check keeps the earlier record's verdicts on other kernels and the refusals of a full
    check. Launch settings stay if none were tuned now.
    """
    before = records.load(device)
    merged = {verdict.key: verdict for verdict in verdicts}
    for verdict in before.verdicts if before is not None and short else ():
        if verdict.key not in merged or (verdict.refused and not before.is_short):
            merged[verdict.key] = verdict
    is_short = short and (before is None or before.is_short)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    if tuned is None:
        tuned = {} if before is None else before.tuned
    return Record(records.identity(device), tuple(merged.values()), is_short, date, tuned)
