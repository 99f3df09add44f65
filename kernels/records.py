"""Which kernels are proven, and where: what `backend="auto"` may take on a GPU.

A kernel is proven on a GPU by a check that ran there (`conddetr check`), whose record lies in the user's cache folder,
or by measurements of its architecture that this package ships in `measured/`. The record comes first. On CPUs the test
suite proves the kernels: a record is only for reading there.

A record counts as long as its `identity` is the present one. It is read once per process and GPU model; after another
process has written one, or CONDDETR_CACHE has changed, `forget` lets it be read again. Code that torch.compile has
compiled keeps what held when it was compiled.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
import platform
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

import torch

from conddetr.files import atomic_file
from conddetr.kernels import native

log = logging.getLogger(__name__)

MEASURED = Path(__file__).parent / "measured"
"""Tables by architecture, `sm_90.json`, as `benchmarks/run.py measured` makes them."""
VERSION = 1
"""Of the files' format."""
_DRIVER_FILES = ("/sys/module/nvidia/version", "/proc/driver/nvidia/version")
_NOT_CHECKED = "it is not checked on this GPU: `conddetr check` does that."


@dataclass(frozen=True)
class Verdict:
    """What was found about one implementation of an operation in one dtype, of all its problems.

    Raises:
        ValueError: an error above the budget, or one that is no number, and no reason in `refused`.
    """

    operation: str
    """Name of the public function."""
    backend: Literal["triton", "native"]
    dtype: Literal["float32", "bfloat16", "float16"]
    refused: str
    """A sentence: why `auto` must not take it, as wrong numbers or more time than PyTorch needs; empty if it may."""
    error: float | None
    """The largest error as a multiple of its budget; None: not known, or not finite."""
    speedup: float | None
    """Time of the best that PyTorch has, divided by ours; None: not timed."""

    def __post_init__(self) -> None:
        if not self.refused and self.error is not None and not self.error <= 1:
            raise ValueError(
                f"Verdict of {self.operation}, {self.backend}, {self.dtype}: expected an error of at most 1, its "
                f"budget, or a reason in `refused`; got {self.error}."
            )
        # JSON has neither infinity nor NaN.
        for name in ("error", "speedup"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is about."""
        return self.operation, self.backend, self.dtype


@dataclass(frozen=True)
class Record:
    """What a check of one device found.

    Raises:
        ValueError: the date is no ISO date, or two verdicts are about the same.
    """

    identity: dict[str, str]
    """`identity` of the device at that time."""
    verdicts: tuple[Verdict, ...]
    is_short: bool
    """Whether only the shapes of the model were checked."""
    date: str
    """When, as ISO 8601."""
    tuned: dict[str, Any]
    """The fastest launch settings, by what they are of (`attn/triton/launch.py`); empty: none were tried."""

    def __post_init__(self) -> None:
        datetime.fromisoformat(self.date)
        _refuse_doubles(self.verdicts)

    def to_json(self) -> str:
        """The text of its file."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The record of a file's text.

        Raises:
            ValueError: it is none, or one of another version of the format; says where.
        """
        return _from_json(cls, text)


@dataclass(frozen=True)
class Table:
    """What was measured on GPUs of one architecture, as `benchmarks/results` has it.

    Raises:
        ValueError: two verdicts are about the same.
    """

    architecture: str
    """E.g. `sm_90`."""
    gpus: dict[str, str]
    """GPU model → versions and dates of its measurements."""
    verdicts: tuple[Verdict, ...]
    """Of the GPU that comes off worst; errors are None, as the benchmarks only tell whether they are in the budget."""

    def __post_init__(self) -> None:
        _refuse_doubles(self.verdicts)

    def to_json(self) -> str:
        """The text of its file."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """See `Record.from_json`."""
        return _from_json(cls, text)


Content = TypeVar("Content")
Answer = TypeVar("Answer", bound=Callable[..., Any])


def _to_json(content: Record | Table) -> str:
    return json.dumps({"version": VERSION, "content": asdict(content)}, indent=1) + "\n"


def _from_json(kind: type[Content], text: str | bytes) -> Content:
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(found, dict) or found.keys() != {"version", "content"}:
            raise ValueError("expected a version and a content")
        if type(found["version"]) is not int or found["version"] != VERSION:
            raise ValueError(f"version: expected {VERSION}, got {found['version']!r}")
        return _parse(kind, found["content"], "content")
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _parse(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as what a field is annotated with.

    Raises:
        ValueError: it is none; says where.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        known = {field.name: field.type for field in fields(kind)}
        if isinstance(value, dict) and value.keys() == known.keys():
            return kind(**{name: _parse(known[name], item, f"{where}.{name}") for name, item in value.items()})
    elif origin is tuple and isinstance(value, list):
        return tuple(_parse(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        return {name: _parse(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    elif origin is Literal:
        if value in arguments:
            return value
    elif kind is Any or (origin in (None, UnionType) and isinstance(value, kind)):
        return value
    raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {str(value)[:60]!r}")


def _refuse_doubles(verdicts: Sequence[Verdict]) -> None:
    for key, count in Counter(verdict.key for verdict in verdicts).items():
        if count > 1:
            raise ValueError(f"expected one verdict about {', '.join(key)}, got {count}")


def identity(device: torch.device) -> dict[str, str]:
    """All that a record depends on, by its name: hardware, driver, PyTorch, Triton, and our kernels."""
    return {
        "device": device_name(device),
        "compute capability": compute_capability(device),
        "driver": _driver() if device.type == "cuda" else "none",
        "PyTorch": str(torch.__version__),
        "Triton": _triton_version(),
        "kernels' sources": _sources(),
        "native library": _library(),
    }


def device_name(device: torch.device) -> str:
    """The model of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def compute_capability(device: torch.device) -> str:
    """Of a GPU, e.g. 9.0; "none" on a CPU."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "none"


def _driver() -> str:
    """The version of NVIDIA's driver; where the system does not tell it, of CUDA as the driver has it."""
    for file in _DRIVER_FILES:
        with contextlib.suppress(OSError):
            # NVIDIA's own file has the compiler's version below.
            if found := re.search(r"\d+\.\d+(\.\d+)?", Path(file).read_text()):
                return found[0]
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
            return f"of CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return "unknown"


def _triton_version() -> str:
    # Nightly builds of PyTorch bring it under other names of packages: the module tells its version always.
    if importlib.util.find_spec("triton") is None:
        return "none"
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return "none"


@functools.cache
def _sources() -> str:
    """A hash of this package's Python files and their names."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        content = file.read_bytes()
        # With its length, so that no two lists of files read alike.
        digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _library() -> str:
    """A hash of how the native library was built, and from which sources: builds of two folders differ in bytes."""
    if native.NOT_LOADED is not None:
        return "none"
    return hashlib.sha256(json.dumps(native.build_info(), sort_keys=True).encode()).hexdigest()[:16]


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
    return folder() / "checked" / _file_name(device)


def _file_name(device: torch.device) -> str:
    name = device_name(device)
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80]
    # Two models whose names are alike in small letters have a file each.
    digest = hashlib.sha256(f"{name}, {compute_capability(device)}".encode()).hexdigest()
    return f"{readable or device.type}-{digest[:6]}.json"


@dataclass(frozen=True)
class _Lookup:
    """What was found when a record was looked for."""

    record: Record | None
    ignored: str | None = None
    """Why a file that is there does not count."""


_lookups: dict[str, _Lookup] = {}
"""By file name, one for each GPU model."""
_tables: dict[str, Table | None] = {}
"""By architecture."""
answers: dict[tuple, Any] = {}
"""What others keep that depends on records: another, empty one whenever these change."""
_pretended: list[tuple[Record | None, Table | None]] = []
_remembering: list[Callable[[], None]] = []
"""Each forgets the answers of a function that `remembered` made."""
_unchecked: set[str] = set()
"""GPU models of which it was said that nothing is known."""
_told: set[Path | None] = set()
"""Folders that could not be written to, once this was said."""


def load(device: torch.device) -> Record | None:
    """The record of this device, if there is one and it holds; `why_ignored` says why one does not."""
    return _look(device).record


def known(device: torch.device) -> Record | None:
    """The record of this device, or as a record the table of its architecture; None: nothing is known of it."""
    record, table = load(device), _table(device)
    if record is not None or table is None:
        return record
    return Record({"device": device_name(device)}, table.verdicts, False, datetime.now(UTC).isoformat(), {})


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


def _look(device: torch.device) -> _Lookup:
    if _pretended:
        return _Lookup(_pretended[-1][0])
    name = _file_name(device)
    # Another thread may make this process forget meanwhile.
    found = _lookups.get(name)
    return found or _lookups.setdefault(name, _read(device))


def _read(device: torch.device) -> _Lookup:
    try:
        file = path(device)
        # Devices and pipes have no end.
        if file.exists() and not file.is_file():
            return _Lookup(None, f"it cannot be read: {file} is no file")
        content = file.read_bytes()
    except FileNotFoundError:
        return _Lookup(None)
    except OSError as error:
        return _Lookup(None, f"it cannot be read: {error}")
    try:
        record = Record.from_json(content)
    except ValueError as error:
        return _Lookup(None, f"{file} is damaged, or of another version: {error}")
    changed = _changes(record.identity, identity(device))
    return _Lookup(None, changed) if changed else _Lookup(record)


def _changes(before: dict[str, str], now: dict[str, str]) -> str:
    """What two identities differ in, e.g. "its driver was 550.1, now 560.2"; empty: nothing."""
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return "; ".join(f"its {name} was {before.get(name, 'none')}, now {now.get(name, 'none')}" for name in names)


def save(device: torch.device, record: Record) -> Path | None:
    """Write a record, and make it the one of this process.

    Where the folder cannot be written to, this is logged once; the record then holds for this process.

    Returns:
        The file; None: it could not be written.
    """
    adopt(device, record)
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


def adopt(device: torch.device, record: Record) -> None:
    """Make a record the one of this process, for all GPUs of the device's model; no file is read or written."""
    _lookups[_file_name(device)] = _Lookup(record)
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


# torch.compile calls it while it traces, and does not trace that files are read.
@torch.compiler.assume_constant_result
def why_not(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why `auto` must not take an implementation on a device, or None if it may. None on CPUs.

    Args:
        operation: name of its public function.
        backend: `triton` or `native`.
        device: of the tensors.
        dtype: of the tensors.
    """
    if device.type != "cuda":
        return None
    if device.index is None and not _pretended:
        device = torch.device("cuda", torch.cuda.current_device())
    found = verdict(operation, backend, device, dtype)
    if found is not None:
        return found.refused or None
    record = load(device)
    if record is None:
        _tell_unchecked(device)
        return _NOT_CHECKED
    if record.is_short:
        return "the short check of this GPU leaves it out: `conddetr check` includes it."
    return f"`conddetr check` does not check it in {_name(dtype)}."


def _tell_unchecked(device: torch.device) -> None:
    """Once for each GPU model: nobody would look for the reason of what is only slow."""
    name = "the GPU" if _pretended else device_name(device)
    if name not in _unchecked:
        _unchecked.add(name)
        log.warning("Plain PyTorch runs on %s, as our kernels are not checked there: `conddetr check` does that.", name)


def verdict(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> Verdict | None:
    """What the record of a device says of an implementation, else the table of its architecture; None: neither does.

    The arguments are those of `why_not`.
    """
    found = _proof(operation, backend, device, dtype)
    return found and found[1]


def source(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """By what an implementation is proven, for people: "checked on NVIDIA H100", "measured on sm_90".

    Empty on CPUs, and for what is not proven or refused. The arguments are those of `why_not`.
    """
    found = _proof(operation, backend, device, dtype) if device.type == "cuda" else None
    return "" if found is None or found[1].refused else found[0]


def _proof(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Verdict] | None:
    """Where a verdict is from, and the verdict."""
    key = (operation, backend, _name(dtype))
    record = load(device)
    for found in record.verdicts if record else ():
        if found.key == key:
            return f"checked on {record.identity.get('device', 'this device')}", found
    table = _table(device)
    for found in table.verdicts if table else ():
        if found.key == key:
            return f"measured on {table.architecture}", found
    return None


def _table(device: torch.device) -> Table | None:
    """The shipped table of a GPU's architecture."""
    if _pretended:
        return _pretended[-1][1]
    if device.type != "cuda":
        return None
    architecture = f"sm_{compute_capability(device).replace('.', '')}"
    if architecture in _tables:
        return _tables[architecture]
    file = MEASURED / f"{architecture}.json"
    return _tables.setdefault(architecture, Table.from_json(file.read_bytes()) if file.exists() else None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
