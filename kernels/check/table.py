"""What a check found, for a person."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from conddetr.kernels.check import Report
    from conddetr.kernels.check.tuning import Tuning

TITLE = "error: over its budget, at most 1; speed: over the best that PyTorch has"
TUNING_TITLE = "launch settings of attention: the fastest; speed: of its pass, over what ships"
PLAIN = "none"
"""In place of a number that there is not."""
MOST = 3
"""Kernels that are named where they are refused for one reason."""


def verdict_table(report: "Report") -> Table:
    """A row for every implementation of every operation in every dtype that can run here."""
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
        # The reason is a line below: a table is cut where the terminal is narrow.
        said = Text("REFUSED", style="red") if verdict.refused else Text("ok")
        table.add_row(verdict.operation, verdict.backend, verdict.dtype, error, speedup, said)
    return table


def tuning_table(tuning: "Tuning") -> Table:
    """A row for every kernel of attention in every form that was tuned."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("form", "kernel", "fastest"):
        table.add_column(name)
    table.add_column("speed", justify="right", no_wrap=True)
    for choice in tuning.choices:
        is_shipped = choice.fastest == choice.shipped
        speed = PLAIN if choice.speedup is None else "ships" if is_shipped else f"{choice.speedup:.2f}×"
        table.add_row(choice.form.described(), choice.kernel, choice.fastest.described(), speed)
    return table


def summary(report: "Report") -> list[str]:
    """Lines below the table: why what is refused is, what is not available and why, which launch settings are left out,
    and one line of all: how many of each, on what device, times, where the record is.
    """
    refusals: dict[str, list[str]] = {}
    for verdict in report.record.verdicts:
        if verdict.refused:
            title = f"{verdict.operation}, {verdict.backend}, {verdict.dtype}"
            refusals.setdefault(verdict.refused, []).append(title)
    refused, missing = (sum(map(len, rows.values())) for rows in (refusals, report.unavailable))
    kind = "short check" if report.record.is_short else "check"
    times = f"{report.seconds:.0f} s"
    if report.compilation is not None:
        times += f" after {report.compilation:.0f} s of compilation"
    place = "no record is kept" if report.file is None else f"record: {report.file}"
    absences = [f"not available: {len(rows)} ({reason.rstrip('.')})" for reason, rows in report.unavailable.items()]
    # As of a GPU that stopped, one reason may be that of all.
    reasons = [
        f"REFUSED: {'; '.join(rows) if len(rows) <= MOST else f'{len(rows)} kernels'}: {reason}"
        for reason, rows in refusals.items()
    ]
    left_out = [] if report.tuning is None else [f"left out: {line}" for line in report.tuning.left_out]
    counts = f"{len(report.record.verdicts) - refused} ok, {refused} refused, {missing} not available"
    last = f"{kind} on {report.record.identity['device']} in {times}: {counts}; {place}"
    return [*absences, *reasons, *left_out, last]
