"""Which implementation really ran: recorded on demand, for fast paths that silently never run are found by nobody."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO

import torch

_recorders: list["Paths"] = []


class Paths(dict[str, Counter[str]]):
    """Name of an operation or of a part of a model → what computed it → how often.

    Operations have the names of their functions, and what computed them is a backend, or the library that took it:
    `paths["conditional_attention"] == {"native": 6}`. Parts of models say which function or module they called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, dict[str, str]] = {}
        """Name of an operation → backend that was not taken → why not; as of the last call."""

    def note(self, name: str, path: str, refused: Mapping[str, str]) -> None:
        """Count a call."""
        self.setdefault(name, Counter())[path] += 1
        if refused:
            self.reasons[name] = dict(refused)

    def __str__(self) -> str:
        # Here, not above: rich takes longer to import than all kernels' functions.
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
    """Record what computes each operation of ours, and each part of our models and of accelerated ones.

        with conddetr.record_paths() as paths:
            model(images)
        print(paths)

    Gradients are computed by what computed the operation, and are not listed. Compiled code records nothing, so that a
    record never breaks a graph. Outside of this nothing is recorded.
    """
    paths = Paths()
    _recorders.append(paths)
    try:
        yield paths
    finally:
        # Not `remove`, which would take an equal one.
        _recorders[:] = [other for other in _recorders if other is not paths]


def note(name: str, path: str, refused: Mapping[str, str] | None = None) -> None:
    """Tell whoever records: `name` is computed by `path` now, for it is not by those that were refused."""
    if torch.compiler.is_compiling():
        return
    for paths in _recorders:
        paths.note(name, path, refused or {})
