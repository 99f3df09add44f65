"""Records of this process's devices, and values derived from them."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from conddetr.kernels.records import files, machine
from conddetr.kernels.records.content import Record, Table, Verdict

Answer = TypeVar("Answer", bound=Callable[..., Any])

_lookups: dict[str, files.Lookup] = {}
"""File name, one for each GPU model → its record."""
_tables: dict[str, Table | None] = {}
"""Architecture → its table."""
answers: dict[tuple, Any] = {}
"""Cache for values that depend on records; replaced by an empty one whenever records change."""
_pretended: list[tuple[Record | None, Table | None]] = []
_remembering: list[Callable[[], None]] = []
"""Each clears the cache of a function that `remembered` made."""


def load(device: torch.device) -> Record | None:
    """The record of this device, if it exists and is valid; `why_ignored` gives the reason if it is not."""
    return _look(device).record


def known(device: torch.device) -> Record | None:
    """The record of this device, or the table of its architecture as a record; None: neither exists."""
    record, measured = load(device), table(device)
    if record is not None or measured is None:
        return record
    return Record({"device": machine.device_name(device)}, measured.verdicts, False, datetime.now(UTC).isoformat(), {})


def restricted(record: Record, others: Sequence[Record]) -> Record:
    """A record that also refuses kernels that other devices' records refuse or do not contain."""

    def reason(verdict: Verdict) -> str:
        for other in others:
            refusal = next((x.refused for x in other.verdicts if x.key == verdict.key), "it is not checked.")
            if refusal:
                return f"on {other.identity['device']}, used by another process: {refusal}"
        return ""

    verdicts = (replace(verdict, refused=verdict.refused or reason(verdict)) for verdict in record.verdicts)
    return replace(record, verdicts=tuple(verdicts))


def why_ignored(device: torch.device) -> str | None:
    """The reason why this device's record file is ignored; None: the record is valid, or no file exists."""
    return _look(device).ignored


def _look(device: torch.device) -> files.Lookup:
    if _pretended:
        return files.Lookup(_pretended[-1][0])
    name = files.file_name(device)
    # Another thread may clear the lookups in between.
    lookup = _lookups.get(name)
    return lookup or _lookups.setdefault(name, files.read(device))


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
    """Write a record and use it in this process.

    A folder that cannot be written to is logged once; the record is then valid for this process only.

    Returns:
        The file; None: it could not be written.
    """
    adopt(device, record)
    return files.write(device, record)


def adopt(device: torch.device, record: Record) -> None:
    """Use a record in this process for all GPUs of the device's model; no file is read or written."""
    _lookups[files.file_name(device)] = files.Lookup(record)
    _drop_answers()


def forget() -> None:
    """Clear all records and tables; they are read again when next needed."""
    _lookups.clear()
    _tables.clear()
    _drop_answers()


def remembered(function: Answer) -> Answer:
    """`functools.cache` for functions that depend on records: the cache is cleared whenever records change."""
    cached = functools.cache(function)
    _remembering.append(cached.cache_clear)
    return cast(Answer, cached)


def _drop_answers() -> None:
    # Replaced, not cleared: another thread may still write an old answer into the old dictionary.
    global answers
    answers = {}
    for forget_all in _remembering:
        forget_all()


@contextlib.contextmanager
def pretend(record: Record | None, table: Table | None = None) -> Iterator[None]:
    """Give every device this record or none, and every architecture this table or none; no file is read.

    For tests, and for programs that count launches on a simulated GPU.
    """
    _pretended.append((record, table))
    _drop_answers()
    try:
        yield
    finally:
        _pretended.pop()
        _drop_answers()


def is_pretending() -> bool:
    """Whether `pretend` is active."""
    return bool(_pretended)
