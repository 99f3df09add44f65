"""Terminal output of a run: lines, tables and progress bars."""

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
"""ASCII replacements of the other characters in our own texts, for outputs that cannot encode them."""


class StandardOutput:
    """The current `sys.stdout` at each call, for text that its encoding may not support.

    A file in Latin-1 or ASCII must not end a training because of a dash in a table. Characters that the encoding lacks
    are written as in `STAND_INS`, others as Python escapes: `\\u4fe1`.
    """

    @property
    def _stream(self) -> TextIO | None:
        """None if there is no output: `pythonw`, or closed. While a bar is shown, rich replaces `sys.stdout`."""
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    @property
    def encoding(self) -> str:
        """Encoding of the stream; rich reads it for its tables and bars."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """Descriptor of the stream.

        Raises:
            OSError: there is no stream.
        """
        if self._stream is None:
            raise OSError("There is no standard output.")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write text; characters that the encoding lacks are replaced.

        Raises:
            OSError: the stream cannot be written, as on a full disk.
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
    """Errors of the system, such as a full disk, say that standard output failed; a broken pipe stays as it is."""
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
    """Print a line as it is; only the terminal wraps it.

    Brackets, colons and numbers are neither markup nor coloured, because paths and names may contain anything.
    """
    console.print(Text(text), soft_wrap=True)


def show(title: str, table: Table) -> None:
    """Print a table below its title. The title is printed by `say`, so a path in it is not broken."""
    say(title)
    console.print(table)


class _Shown:
    """A bar that is shown within a `with` block."""

    _bar: RichProgress

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class Progress(_Shown):
    """A bar with images/s, a note (losses) and the time left. Silent if the output is not a terminal.

    `total` may be None if the amount of work is not known yet.
    """

    def __init__(self, title: str, total: int | None, disable: bool = False) -> None:
        self.is_shown = not disable and console.file.isatty()
        """Whether the bar, and so a note, is visible."""
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
        """Count `images` more as done; `total` sets the total if it was not known before."""
        task = self._bar.tasks[self._task]
        rate = f"{task.speed:.1f}" if task.speed else "…"
        self._bar.update(self._task, advance=images, rate=rate, note=note, total=total)


class Steps(_Shown):
    """A bar of steps; each phase may have its own total. Silent if the output is not a terminal."""

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
        """Show the current work, and that `done` steps of `total` are finished."""
        self._bar.update(self._task, completed=done, total=total, note=note)
