"""What a check or a measurement says of kernels, and the text of its file."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import datetime
from types import UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

VERSION = 1
"""Of the files' format."""


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
