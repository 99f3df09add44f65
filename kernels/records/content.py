"""Results of checks and measurements of kernels, and the text of their files."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import datetime
from types import UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

VERSION = 1
"""Version of the files' format."""


@dataclass(frozen=True)
class Verdict:
    """The result for one implementation of an operation in one dtype, over all its problems.

    Raises:
        ValueError: the error is above the budget or not a number, and `refused` gives no reason.
    """

    operation: str
    """Name of the public function."""
    backend: Literal["triton", "native"]
    dtype: Literal["float32", "bfloat16", "float16"]
    refused: str
    """A sentence with the reason why `auto` must not use it: wrong numbers, or slower than PyTorch. Empty if it may."""
    error: float | None
    """The largest error as a multiple of its budget; None: unknown or not finite."""
    speedup: float | None
    """Time of PyTorch's fastest implementation divided by ours; None: not timed."""

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
        """Operation, backend and dtype."""
        return self.operation, self.backend, self.dtype


@dataclass(frozen=True)
class Record:
    """The result of a check of one device.

    Raises:
        ValueError: the date is no ISO date, or two verdicts have the same key.
    """

    identity: dict[str, str]
    """`identity` of the device during the check."""
    verdicts: tuple[Verdict, ...]
    is_short: bool
    """Whether only the shapes of the model were checked."""
    date: str
    """Date of the check, as ISO 8601."""
    tuned: dict[str, Any]
    """The fastest launch settings, with the keys of `attn/triton/launch.py`; empty: none were tried."""

    def __post_init__(self) -> None:
        datetime.fromisoformat(self.date)
        _refuse_doubles(self.verdicts)

    def to_json(self) -> str:
        """The text of its file."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse a record from a file's text.

        Raises:
            ValueError: the text is no record, or has another version of the format; names the field.
        """
        return _from_json(cls, text)


@dataclass(frozen=True)
class Table:
    """Measurements on GPUs of one architecture, from `benchmarks/results`.

    Raises:
        ValueError: two verdicts have the same key.
    """

    architecture: str
    """E.g. `sm_90`."""
    gpus: dict[str, str]
    """GPU model → versions and dates of its measurements."""
    verdicts: tuple[Verdict, ...]
    """Results on the GPU that performs worst; errors are None, because benchmarks only compare them with the budget."""

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
        parsed = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(parsed, dict) or parsed.keys() != {"version", "content"}:
            raise ValueError("expected an object with the keys version and content")
        if type(parsed["version"]) is not int or parsed["version"] != VERSION:
            raise ValueError(f"version: expected {VERSION}, got {parsed['version']!r}")
        return _parse(kind, parsed["content"], "content")
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _parse(expected: Any, value: Any, path: str) -> Any:
    """Convert a JSON value to the type with which a field is annotated.

    Raises:
        ValueError: the value does not have that type; names the field.
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if is_dataclass(expected):
        known = {field.name: field.type for field in fields(expected)}
        if isinstance(value, dict) and value.keys() == known.keys():
            return expected(**{name: _parse(known[name], item, f"{path}.{name}") for name, item in value.items()})
    elif origin is tuple and isinstance(value, list):
        return tuple(_parse(arguments[0], item, f"{path}[{number}]") for number, item in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        return {name: _parse(arguments[1], item, f"{path}.{name}") for name, item in value.items()}
    elif origin is Literal:
        if value in arguments:
            return value
    elif expected is Any or (origin in (None, UnionType) and isinstance(value, expected)):
        return value
    raise ValueError(f"{path}: expected {getattr(expected, '__name__', expected)}, got {str(value)[:60]!r}")


def _refuse_doubles(verdicts: Sequence[Verdict]) -> None:
    for key, count in Counter(verdict.key for verdict in verdicts).items():
        if count > 1:
            raise ValueError(f"expected one verdict for {', '.join(key)}, got {count}")
