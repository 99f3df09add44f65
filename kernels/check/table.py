"""Tables and lines that print the result of a check."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from conddetr.kernels.check import Report
    from conddetr.kernels.check.tuning import Tuning

TITLE = "error: relative to its budget, at most 1; speed: relative to PyTorch's fastest"
TUNING_TITLE = "fastest launch settings of attention; speed: of the whole pass, relative to the shipped settings"
PLAIN = "none"
"""Shown for a number that does not exist."""
MOST = 3
"""Maximum number of kernels that are listed by name for one refusal."""


def verdict_table(report: "Report") -> Table:
    """A row for every operation, implementation and dtype that can run here."""
    # Narrow, so that 80 columns hold it.
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("operation", "backend", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("error", "speed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for verdict in report.record.verdicts:
        error = PLAIN if verdict.error is None else f"{verdict.error:.2f}"
        speedup = PLAIN if verdict.speedup is None else f"{verdict.speedup:.{2 if verdict.speedup < 100 else 0}f}×"
        # The reason is a line below the table, because a narrow terminal cuts the table.
        status = Text("REFUSED", style="red") if verdict.refused else Text("ok")
        table.add_row(verdict.operation, verdict.backend, verdict.dtype, error, speedup, status)
    return table


def tuning_table(tuning: "Tuning") -> Table:
    """A row for every tuned kernel and variant of attention."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("variant", "kernel", "fastest"):
        table.add_column(name)
    table.add_column("speed", justify="right", no_wrap=True)
    for choice in tuning.choices:
        is_shipped = choice.fastest == choice.shipped
        speed = PLAIN if choice.speedup is None else "shipped" if is_shipped else f"{choice.speedup:.2f}×"
        table.add_row(choice.form.described(), choice.kernel, choice.fastest.described(), speed)
    return table


def summary(report: "Report") -> list[str]:
    """Lines below the table: unavailable implementations, refusals and omitted launch settings with their reasons, then
    one line with the counts, the device, the times and the path of the record.
    """
    refusals: dict[str, list[str]] = {}
    for verdict in report.record.verdicts:
        if verdict.refused:
            title = f"{verdict.operation}, {verdict.backend}, {verdict.dtype}"
            refusals.setdefault(verdict.refused, []).append(title)
    refused, missing = (sum(map(len, rows.values())) for rows in (refusals, report.unavailable))
    name = "short check" if report.record.is_short else "check"
    times = f"{report.seconds:.0f} s"
    if report.compilation is not None:
        times += f" after {report.compilation:.0f} s of compilation"
    record = "no record is kept" if report.file is None else f"record: {report.file}"
    absences = [f"not available: {len(rows)} ({reason.rstrip('.')})" for reason, rows in report.unavailable.items()]
    # One reason may hold for all, such as a GPU that failed.
    reasons = [
        f"REFUSED: {'; '.join(rows) if len(rows) <= MOST else f'{len(rows)} kernels'}: {reason}"
        for reason, rows in refusals.items()
    ]
    left_out = [] if report.tuning is None else [f"left out: {line}" for line in report.tuning.left_out]
    counts = f"{len(report.record.verdicts) - refused} ok, {refused} refused, {missing} not available"
    last = f"{name} on {report.record.identity['device']} in {times}: {counts}; {record}"
    return [*absences, *reasons, *left_out, last]
