"""Records on demand which implementation ran, because a fast path that never runs is otherwise not noticed."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO

import torch

_recorders: list["Paths"] = []


class Paths(dict[str, Counter[str]]):
    """Name of an operation or of a part of a model → implementation → number of calls.

    Operations have the names of their functions; their implementation is a backend or a library:
    `paths["conditional_attention"] == {"native": 6}`. The implementation of a model's part is a function or module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, dict[str, str]] = {}
        """Name of an operation → backend that was not used → reason; from the last call."""

    def note(self, name: str, path: str, refused: Mapping[str, str]) -> None:
        """Count a call."""
        self.setdefault(name, Counter())[path] += 1
        if refused:
            self.reasons[name] = dict(refused)

    def __str__(self) -> str:
        # Imported here, because importing rich takes longer than importing all kernels.
        from rich.console import Console
        from rich.table import Table

        if not self:
            return "nothing was recorded: nothing ran, or it was compiled (torch.compile records nothing)"
        table = Table(box=None, header_style="bold")
        for title in ("operation or part", "computed by", "calls", "not by"):
            table.add_column(title, justify="right" if title == "calls" else "left")
        for name, counts in self.items():
            refused = "; ".join(f"{backend}: {reason}" for backend, reason in self.reasons.get(name, {}).items())
            for path, count in counts.items():
                table.add_row(name, path, str(count), refused)
        text = StringIO()
        Console(file=text, width=120).print(table)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


@contextmanager
def record_paths() -> Iterator[Paths]:
    """Record the implementation of each of our operations and of each part of our models and accelerated ones.

        with conddetr.record_paths() as paths:
            model(images)
        print(paths)

    Gradients run on the implementation of their operation and are not listed. Compiled code records nothing, so that
    recording never breaks a graph. Nothing is recorded outside of this context.
    """
    paths = Paths()
    _recorders.append(paths)
    try:
        yield paths
    finally:
        # Not `remove`, which would remove an equal one.
        _recorders[:] = [other for other in _recorders if other is not paths]


def note(name: str, path: str, refused: Mapping[str, str] | None = None) -> None:
    """Report to all recorders that `path` computes `name` now, and why the refused backends do not."""
    if torch.compiler.is_compiling():
        return
    for paths in _recorders:
        paths.note(name, path, refused or {})
