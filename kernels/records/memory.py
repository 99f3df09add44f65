"""What this process knows of its devices, and what it made of that."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from conddetr.kernels.records import files, machine
from conddetr.kernels.records.content import Record, Table, Verdict

Answer = TypeVar("Answer", bound=Callable[..., Any])

_lookups: dict[str, files.Lookup] = {}
"""By file name, one for each GPU model."""
_tables: dict[str, Table | None] = {}
"""By architecture."""
answers: dict[tuple, Any] = {}
"""What others keep that depends on records: another, empty one whenever these change."""
_pretended: list[tuple[Record | None, Table | None]] = []
_remembering: list[Callable[[], None]] = []
"""Each forgets the answers of a function that `remembered` made."""


def load(device: torch.device) -> Record | None:
    """The record of this device, if there is one and it holds; `why_ignored` says why one does not."""
    return _look(device).record


def known(device: torch.device) -> Record | None:
    """The record of this device, or as a record the table of its architecture; None: nothing is known of it."""
    record, measured = load(device), table(device)
    if record is not None or measured is None:
        return record
    return Record({"device": machine.device_name(device)}, measured.verdicts, False, datetime.now(UTC).isoformat(), {})


def restricted(record: Record, others: Sequence[Record]) -> Record:
    """A record that also refuses what those of other devices refuse, or do not know."""

    def reason(verdict: Verdict) -> str:
        for other in others:
            found = next((x.refused for x in other.verdicts if x.key == verdict.key), "it is not checked.")
            if found:
                return f"on {other.identity['device']}, which another process has: {found}"
        return ""

    verdicts = (replace(verdict, refused=verdict.refused or reason(verdict)) for verdict in record.verdicts)
    return replace(record, verdicts=tuple(verdicts))


def why_ignored(device: torch.device) -> str | None:
    """Why the record of this device does not count, though there is a file; None: it does, or there is none."""
    return _look(device).ignored


def _look(device: torch.device) -> files.Lookup:
    if _pretended:
        return files.Lookup(_pretended[-1][0])
    name = files.file_name(device)
    # Another thread may make this process forget meanwhile.
    found = _lookups.get(name)
    return found or _lookups.setdefault(name, files.read(device))


def table(device: torch.device) -> Table | None:
    """The shipped table of a GPU's architecture."""
    if _pretended:
        return _pretended[-1][1]
    if device.type != "cuda":
        return None
    architecture = f"sm_{machine.compute_capability(device).replace('.', '')}"
    if architecture in _tables:
        return _tables[architecture]
    return _tables.setdefault(architecture, files.read_table(architecture))


def save(device: torch.device, record: Record) -> Path | None:
    """Write a record, and make it the one of this process.

    Where the folder cannot be written to, this is logged once; the record then holds for this process.

    Returns:
        The file; None: it could not be written.
    """
    adopt(device, record)
    return files.write(device, record)


def adopt(device: torch.device, record: Record) -> None:
    """Make a record the one of this process, for all GPUs of the device's model; no file is read or written."""
    _lookups[files.file_name(device)] = files.Lookup(record)
    _drop_answers()


def forget() -> None:
    """Let records and tables be read again when they are next asked for."""
    _lookups.clear()
    _tables.clear()
    _drop_answers()


def remembered(function: Answer) -> Answer:
    """`functools.cache` for what depends on records: it forgets when another record may hold."""
    cached = functools.cache(function)
    _remembering.append(cached.cache_clear)
    return cached


def _drop_answers() -> None:
    # Not emptied: a thread that is about to keep an answer has one of before.
    global answers
    answers = {}
    for forget_all in _remembering:
        forget_all()


@contextlib.contextmanager
def pretend(record: Record | None, table: Table | None = None) -> Iterator[None]:
    """Within, every device has this record, or none, and every architecture this table, or none; no file is read.

    For tests, and for programs that count launches on a GPU that computes nothing.
    """
    _pretended.append((record, table))
    _drop_answers()
    try:
        yield
    finally:
        _pretended.pop()
        _drop_answers()


def is_pretending() -> bool:
    """Whether the devices are those of `pretend`."""
    return bool(_pretended)
