"""Where records and tables lie, and how they are read and written."""

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
"""Tables by architecture, `sm_90.json`, as `benchmarks/run.py measured` makes them."""
_told: set[Path | None] = set()
"""Folders that could not be written to, once this was said."""


def folder() -> Path:
    """Where records are kept: CONDDETR_CACHE, else `conddetr` in XDG_CACHE_HOME, else in `~/.cache`.

    Raises:
        OSError: none of them is set and the user has no home folder.
    """
    try:
        if named := os.environ.get("CONDDETR_CACHE"):
            return Path(named).expanduser().absolute()
        # By its specification, a relative one does not count.
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (base if base.is_absolute() else Path.home() / ".cache") / "conddetr"
    except RuntimeError as error:
        raise OSError("there is no home folder") from error


def path(device: torch.device) -> Path:
    """The file of a device's record: one for each GPU model.

    Raises:
        OSError: as of `folder`.
    """
    return folder() / "checked" / file_name(device)


def file_name(device: torch.device) -> str:
    """Of a device's record: the same for all GPUs of a model, and for no two models."""
    name = machine.device_name(device)
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80]
    # Two models whose names are alike in small letters have a file each.
    digest = hashlib.sha256(f"{name}, {machine.compute_capability(device)}".encode()).hexdigest()
    return f"{readable or device.type}-{digest[:6]}.json"


@dataclass(frozen=True)
class Lookup:
    """What was found when a record was looked for."""

    record: Record | None
    ignored: str | None = None
    """Why a file that is there does not count."""


def read(device: torch.device) -> Lookup:
    """The record in the file of a device, if it is that of the device as it is now."""
    try:
        file = path(device)
        # Devices and pipes have no end.
        if file.exists() and not file.is_file():
            return Lookup(None, f"it cannot be read: {file} is no file")
        content = file.read_bytes()
    except FileNotFoundError:
        return Lookup(None)
    except OSError as error:
        return Lookup(None, f"it cannot be read: {error}")
    try:
        record = Record.from_json(content)
    except ValueError as error:
        return Lookup(None, f"{file} is damaged, or of another version: {error}")
    changed = _changes(record.identity, machine.identity(device))
    return Lookup(None, changed) if changed else Lookup(record)


def _changes(before: dict[str, str], now: dict[str, str]) -> str:
    """What two identities differ in, e.g. "its driver was 550.1, now 560.2"; empty: nothing."""
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return "; ".join(f"its {name} was {before.get(name, 'none')}, now {now.get(name, 'none')}" for name in names)


def write(device: torch.device, record: Record) -> Path | None:
    """Write a record to the file of its device. Where the folder cannot be written to, this is logged once.

    Returns:
        The file; None: it could not be written.
    """
    place = None
    try:
        place = folder()
        file = path(device)
        # Another process may save at the same time, of another machine too where the folder is shared.
        with atomic_file(file, file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")) as partial:
            partial.write_text(record.to_json(), encoding="utf-8")
        return file
    except OSError as error:
        if place not in _told:
            _told.add(place)
            log.warning(
                "The record of this check is not kept, as %s cannot be written to: %s. CONDDETR_CACHE names another "
                "folder.",
                place or "the cache folder",
                error,
            )
        return None


def read_table(architecture: str) -> Table | None:
    """The table that is shipped of an architecture, e.g. `sm_90`."""
    file = MEASURED / f"{architecture}.json"
    return Table.from_json(file.read_bytes()) if file.exists() else None
