"""Paths of records and tables, and reading and writing them."""

import hashlib
import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch

from conddetr.files import atomic_file
from conddetr.kernels.records import machine
from conddetr.kernels.records.content import Record, Table

log = logging.getLogger(__name__)

MEASURED = Path(__file__).parents[1] / "measured"
"""Folder of tables by architecture, such as `sm_90.json`, written by `benchmarks/run.py measured`."""
_reported: set[Path | None] = set()
"""Folders that cannot be written to and were reported."""


def folder() -> Path:
    """The folder of records: CONDDETR_CACHE, else `conddetr` in XDG_CACHE_HOME, else in `~/.cache`.

    Raises:
        OSError: no variable is set and the user has no home folder.
    """
    try:
        if named := os.environ.get("CONDDETR_CACHE"):
            return Path(named).expanduser().absolute()
        # The XDG specification ignores relative paths.
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (base if base.is_absolute() else Path.home() / ".cache") / "conddetr"
    except RuntimeError as error:
        raise OSError("there is no home folder") from error


def path(device: torch.device) -> Path:
    """The file of a device's record: one for each GPU model.

    Raises:
        OSError: see `folder`.
    """
    return folder() / "checked" / file_name(device)


def file_name(device: torch.device) -> str:
    """Name of a device's record file: equal for all GPUs of a model, different for different models."""
    name = machine.device_name(device)
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80]
    # The hash separates models whose readable names are equal.
    digest = hashlib.sha256(f"{name}, {machine.compute_capability(device)}".encode()).hexdigest()
    return f"{readable or device.type}-{digest[:6]}.json"


@dataclass(frozen=True)
class Lookup:
    """The result of looking up a record."""

    record: Record | None
    ignored: str | None = None
    """The reason why an existing file is ignored."""


def read(device: torch.device) -> Lookup:
    """Read the record in a device's file, if it matches the device's current identity."""
    try:
        file = path(device)
        # Reading device files and pipes might never end.
        if file.exists() and not file.is_file():
            return Lookup(None, f"it cannot be read: {file} is no regular file")
        content = file.read_bytes()
    except FileNotFoundError:
        return Lookup(None)
    except OSError as error:
        return Lookup(None, f"it cannot be read: {error}")
    try:
        record = Record.from_json(content)
    except ValueError as error:
        return Lookup(None, f"{file} is damaged, or has another version: {error}")
    changed = _changes(record.identity, machine.identity(device))
    return Lookup(None, changed) if changed else Lookup(record)


def _changes(before: dict[str, str], now: dict[str, str]) -> str:
    """Differences of two identities, e.g. "its driver was 550.1, now 560.2"; empty: they are equal."""
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return "; ".join(f"its {name} was {before.get(name, 'none')}, now {now.get(name, 'none')}" for name in names)


def write(device: torch.device, record: Record) -> Path | None:
    """Write a record to the file of its device. A folder that cannot be written to is logged once.

    Returns:
        The file; None: it could not be written.
    """
    directory = None
    try:
        directory = folder()
        file = path(device)
        # Another process may save at the same time, even on another machine if the folder is shared.
        with atomic_file(file, file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")) as partial:
            partial.write_text(record.to_json(), encoding="utf-8")
        return file
    except OSError as error:
        if directory not in _reported:
            _reported.add(directory)
            log.warning(
                "The record of this check is not saved, because %s cannot be written to: %s. Set CONDDETR_CACHE to "
                "another folder.",
                directory or "the cache folder",
                error,
            )
        return None


def read_table(architecture: str) -> Table | None:
    """The shipped table of an architecture, e.g. `sm_90`."""
    file = MEASURED / f"{architecture}.json"
    return Table.from_json(file.read_bytes()) if file.exists() else None
