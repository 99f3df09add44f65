"""What a person sees of a run: lines, tables, and the bar while work goes on."""

import contextlib
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Self, TextIO

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

STAND_INS = str.maketrans({"–": "-", "…": "...", "×": "x", "·": ".", "≥": ">=", "λ": "lambda"})
"""What our own words use beyond ASCII, where the output cannot take it."""


class StandardOutput:
    """`sys.stdout` as it is at the moment of each call, for a text that its encoding may not hold.

    A file in Latin-1 or ASCII must not end a training for the dash in its last table. What the encoding cannot take is
    written as one of `STAND_INS`, else as Python escapes it: `\\u4fe1`.
    """

    @property
    def _stream(self) -> TextIO | None:
        """None where there is no output: `pythonw`, or a closed one. While a bar is shown, rich stands before it."""
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    @property
    def encoding(self) -> str:
        """Of the stream; rich draws tables and bars by it."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether a person looks on."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """Of the stream.

        Raises:
            OSError: it has none.
        """
        if self._stream is None:
            raise OSError("There is no standard output.")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write it, characters that do not fit replaced.

        Raises:
            OSError: it cannot be written, as on a full disk.
        """
        if self._stream is None:
            return 0
        with _output_errors():
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self.encoding
                fitting = "".join(char if _fits(char, encoding) else char.translate(STAND_INS) for char in text)
                return self._stream.write(fitting.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        """Flush the stream; errors as `write`."""
        if self._stream is not None:
            with _output_errors():
                self._stream.flush()


@contextlib.contextmanager
def _output_errors() -> Iterator[None]:
    """An error of the system, as of a full disk, says what could not be written; a pipe that ended stays one."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"The standard output could not be written: {error.strerror or error}.") from error


def _fits(char: str, encoding: str) -> bool:
    try:
        char.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


console = Console(file=StandardOutput())


def say(text: str) -> None:
    """Print a line as it is, broken by nothing but the terminal.

    Brackets, colons and numbers in it are neither markup nor coloured: paths and names hold anything.
    """
    console.print(Text(text), soft_wrap=True)


def show(title: str, table: Table) -> None:
    """Print a table below its title, which is a line as of `say`: a path in it stays whole."""
    say(title)
    console.print(table)


class _Shown:
    """A bar that is there within a `with` block."""

    _bar: RichProgress

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class Progress(_Shown):
    """A bar with images/s, a note (losses) and the time left. Silent where the output is no terminal.

    `total` may be None, for work whose amount is not known yet.
    """

    def __init__(self, title: str, total: int | None, disable: bool = False) -> None:
        self.is_shown = not disable and console.file.isatty()
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

    def advance(self, images: int, note: str = "", total: int | None = None) -> None:
        """Count `images` more as done, of `total` where that was not known before."""
        task = self._bar.tasks[self._task]
        rate = f"{task.speed:.1f}" if task.speed else "…"
        self._bar.update(self._task, advance=images, rate=rate, note=note, total=total)


class Steps(_Shown):
    """A bar of steps, of whose phases each has a number of its own. Silent where the output is no terminal."""

    def __init__(self, title: str) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.file.isatty(),
            transient=True,
        )
        self._task = self._bar.add_task(title, total=None, note="")

    def tell(self, note: str, done: int, total: int) -> None:
        """Show what is being done, and that `done` steps of `total` are."""
        self._bar.update(self._task, completed=done, total=total, note=note)
