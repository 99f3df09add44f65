"""What a person sees: lines, the bar while work goes on, and the tables at its end."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from conddetr.engine.evaluator import ClassMetrics

console = Console()


def say(text: str) -> None:
    """Print a line as it is, broken by nothing but the terminal.

    Brackets, colons and numbers in it are neither markup nor coloured: paths and names hold anything.
    """
    console.print(Text(text), soft_wrap=True)


def show(title: str, table: Table) -> None:
    """Print a table below its title, which is a line as of `say`: a path in it stays whole."""
    say(title)
    console.print(table)


class Progress:
    """A bar with images/s, a note (losses) and the time left. Silent where the output is no terminal.

    `total` may be None, for work whose amount is not known yet.
    """

    def __init__(self, title: str, total: int | None, disable: bool = False) -> None:
        self.is_shown = not disable and sys.stdout.isatty()
        """Whether anybody sees a note."""
        self._bar = RichProgress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} images/s"),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.is_shown,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, rate="…", note="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, images: int, note: str = "", total: int | None = None) -> None:
        """Count `images` more as done, of `total` where that was not known before."""
        task = self._bar.tasks[self._task]
        rate = f"{task.speed:.1f}" if task.speed else "…"
        self._bar.update(self._task, advance=images, rate=rate, note=note, total=total)


def class_table(classes: "list[ClassMetrics]") -> Table:
    """AP and recall of every class in percent, best first, as a table for the terminal."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("class")
    for name in ("objects", "AP", "AP50", "AP75", "AR100"):
        table.add_column(name, justify="right")
    for row in sorted(classes, key=lambda row: -row.ap):
        values = (row.ap, row.ap50, row.ap75, row.ar100)
        table.add_row(Text(row.name), str(row.objects), *(_percent(value) for value in values))
    return table


def metrics_table(metrics: dict[str, float]) -> Table:
    """COCO's twelve numbers in percent, as a table for the terminal."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in metrics:
        table.add_column(name, justify="right")
    table.add_row(*(_percent(value) for value in metrics.values()))
    return table


def _percent(value: float) -> str:
    """A dash where nothing counts."""
    return f"{100 * value:.1f}" if value >= 0 else "–"
