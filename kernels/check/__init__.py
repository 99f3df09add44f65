"""Proves the kernels on the device that they run on: numbers, gradients, dropout, bits, memory, and then the time.

`conddetr check` prints what `examine` finds; `check` gives the record alone, which `backend="auto"` goes by.
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
"""Takes what is being done, and of how many steps how many are done."""


@dataclass(frozen=True)
class Report:
    """What a check found, for a person too."""

    device: torch.device
    record: Record
    unavailable: dict[str, list[str]]
    """Why an implementation cannot run here → the rows that this is said of."""
    file: Path | None
    """The record's; None: it could not be written, or is not kept, as the GPU was full."""
    seconds: float
    """Of the check, without compilation."""
    compilation: float | None
    """Seconds that compilation took before; None: nothing is compiled on this device."""
    tuning: "Tuning | None" = None
    """Of launch settings; None: it was not asked for."""


@dataclass
class _Found:
    """So far."""

    verdicts: list[Verdict] = field(default_factory=list)
    unavailable: dict[str, list[str]] = field(default_factory=dict)
    full: list[Verdict] = field(default_factory=list)
    """About what the GPU had no memory for: against it while this process runs."""


def check(
    device: str | torch.device,
    *,
    short: bool = False,
    tune: bool = False,
    dtypes: Sequence[torch.dtype] | None = None,
    progress: Progress | None = None,
) -> Record:
    """Check every kernel on a device, and keep the record of it.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.
        short: only the sizes of the model.
        tune: before, try launch settings on a GPU, and keep the fastest in the record; else those of an earlier record
            stay.
        dtypes: of float32, bfloat16 and float16 those that matter; default: all of them.
        progress: is told how far it is.

    Returns:
        The record, which is saved. An interrupted check saves none, nor does one for which the GPU is too full.

    Raises:
        ValueError: no such device, a dtype that is not checked, or nothing that can be tuned.
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
    """As `check`, with what a person wants to know beside it."""
    device, dtypes = _device(device), _dtypes(dtypes)
    if tune:
        _check_tunable(device)
    tell = progress or (lambda what, done, total: None)
    rows = _rows(device, dtypes, short)
    with isolated(device):
        lost = None if _computes(device) else f"nothing is right on {device}: plain PyTorch's sums are wrong."
        compilation = None
        if device.type == "cuda" and lost is None:
            compilation = compile_kernels(device, short, dtypes, tell, tune)
        begin = time.perf_counter()
        tuning = None
        if tune:
            tuning, lost = _tune(device, dtypes, tell, lost)
            found = _judge_tuned(rows, device, tell, lost, tuning)
        else:
            found = _judge_all(rows, device, tell, lost)
        seconds = time.perf_counter() - begin
        # Within: a GPU that stopped may not let anything be put back.
        record = _record(device, found.verdicts, short, None if tuning is None else tuning.settings())
        if found.full:
            file = None
            adopted = {verdict.key: verdict for verdict in (*found.full, *record.verdicts)}
            records.adopt(device, replace(record, verdicts=tuple(adopted.values())))
        else:
            file = records.save(device, record)
    return Report(device, record, found.unavailable, file, seconds, compilation, tuning)


def _check_tunable(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"tune: only GPU kernels have launch settings, and the device is {device}.")
    if not registry.HAS_TRITON:
        raise ValueError("tune: only Triton's kernels have launch settings, and the package triton is not installed.")


def _tune(
    device: torch.device, dtypes: tuple[torch.dtype, ...], tell: Progress, lost: str | None
) -> tuple["Tuning", str | None]:
    """What was found, and why nothing can be checked after it."""
    # Its kernels need Triton.
    from conddetr.kernels.check import tuning

    if lost is not None:
        found = tuning.Tuning()
    else:
        found = tuning.tune(device, dtypes, tell)
        lost = _stopped(device, "launch settings of attention")
    if lost is not None:
        found.refuse(lost)
    return found, lost


def _judge_tuned(rows: list[Row], device: torch.device, tell: Progress, lost: str | None, tuning: "Tuning") -> _Found:
    """With the tuned settings; where one is no good for all sizes of attention, with none of them."""
    from conddetr.kernels.check.tuning import in_effect

    settings = tuning.settings()
    with in_effect(device, settings):
        found = _judge_all(rows, device, tell, lost)
    refused = [x for x in found.verdicts if (x.operation, x.backend) == TUNED and x.refused]
    if settings and refused:
        tuning.refuse(f"with the fastest of them {TUNED[0]} is refused in {refused[0].dtype}: {refused[0].refused}")
        kept = [x for x in found.verdicts if (x.operation, x.backend) != TUNED]
        lost = lost or _stopped(device, "launch settings of attention")
        with in_effect(device, {}):
            again = _judge_all([row for row in rows if (row.operation, row.backend) == TUNED], device, tell, lost)
        found.verdicts[:] = [*kept, *again.verdicts]
    return found


def _device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}.") from error
    if device.type not in IMAGES:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {str(device)!r}: nothing else has kernels.")
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
    """Every implementation in every dtype, those of one operation one after the other."""
    wanted = [
        problem
        for problem in problems(IMAGES[device.type])
        if (problem.is_model or not short) and (device.type == "cuda" or not problem.is_tf32)
    ]
    found = []
    for operation in dict.fromkeys(problem.operation for problem in wanted):
        for backend in backends(operation):
            for dtype in dtypes:
                chosen = tuple(x for x in wanted if x.operation == operation and dtype in x.dtypes)
                is_timed = dtype in registry.OPERATIONS[operation].kernels[backend].auto_dtypes
                if chosen:
                    found.append(Row(operation, backend, dtype, chosen, is_timed))
    return found


def backends(operation: str) -> tuple[str, ...]:
    """Those of an operation that are kernels."""
    return tuple(backend for backend in registry.OPERATIONS[operation].backends if backend != "eager")


def _computes(device: torch.device) -> bool:
    """Whether a device can add up, as one that is broken or pretended cannot."""
    numbers = torch.arange(1000, dtype=torch.float64, device=device)
    return (numbers * numbers).sum().item() == 332_833_500


def _judge_all(rows: list[Row], device: torch.device, tell: Progress, lost: str | None) -> _Found:
    """`lost`: why nothing can be checked."""
    found = _Found()
    total, done = sum(len(row.problems) for row in rows), 0
    for row in rows:
        tell(row.title, done, total)
        reason = _why_not(row, device)
        if reason is None and lost is not None:
            found.verdicts.append(row.verdict(lost, None, None))
        elif reason is None:
            try:
                told = partial(_tell_row, tell, row.title, done, total)
                found.verdicts.append(judge(row, device, told))
            except registry.BackendError as error:
                reason = str(error)
            except torch.OutOfMemoryError:
                reason = NO_MEMORY
                found.full.append(row.verdict(NO_MEMORY, None, None))
            lost = _stopped(device, row.title)
        if reason is not None:
            found.unavailable.setdefault(reason, []).append(row.title)
        done += len(row.problems)
    tell("done", total, total)
    return found


def _tell_row(tell: Progress, title: str, before: int, total: int, verified: int) -> None:
    tell(title, before + verified, total)


def _why_not(row: Row, device: torch.device) -> str | None:
    """The reason why an implementation cannot run here, whatever the shapes are."""
    if row.backend == "triton" and device.type == "cpu":
        return "Triton's kernels run on GPUs."
    return registry.OPERATIONS[row.operation].why_not(row.backend, device, row.dtype)


def _stopped(device: torch.device, title: str) -> str | None:
    """Why nothing can be checked after this: an error that a GPU does not recover from in this process."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
        # Whoever called needs the memory.
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return f"it was not checked, as the GPU stopped at {title}: {str(error).splitlines()[0]}"
    return None


def _record(device: torch.device, verdicts: list[Verdict], short: bool, tuned: dict[str, Any] | None = None) -> Record:
    """After a short check what the record of before says of other kernels stays, and what a full check refused; launch
    settings stay where none were tried now.
    """
    before = records.load(device)
    found = {verdict.key: verdict for verdict in verdicts}
    for verdict in before.verdicts if before is not None and short else ():
        if verdict.key not in found or (verdict.refused and not before.is_short):
            found[verdict.key] = verdict
    is_short = short and (before is None or before.is_short)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    if tuned is None:
        tuned = {} if before is None else before.tuned
    return Record(records.identity(device), tuple(found.values()), is_short, date, tuned)
