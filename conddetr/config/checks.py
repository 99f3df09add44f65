"""Checks of options, shared by all configurations. Each raises a ValueError that names the option and its value."""

import difflib
from dataclasses import fields
from numbers import Integral
from typing import Any, Literal, get_args, get_origin


def nearest(name: str, known: list[str]) -> str:
    """End of an error message: the closest known name, if one is similar, and the list of known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(known)}."


def plain_type(kind: Any) -> type:
    """Type of an option's values: `str` for a `Literal`, whose choices are strings."""
    return str if get_origin(kind) is Literal else kind


def check_values(config: Any, what: str) -> None:
    """Raise a ValueError if a dataclass field's value is not of its type, or not one of its `Literal`'s choices. An int
    passes as a float.
    """
    for field in fields(config):
        check_value(f"{what} {field.name}", getattr(config, field.name), field.type)


def check_value(name: str, value: Any, wanted: Any) -> None:
    """Raise a ValueError if a value is not of a type, or not one of a `Literal`'s choices; see `check_values`."""
    expected_type = plain_type(wanted)
    accepted = (int, float) if expected_type is float else (expected_type,)
    if type(value) not in accepted:
        raise ValueError(f"{name}: expected {expected_type.__name__}, got {type(value).__name__} {value!r}.")
    if wanted is not expected_type and value not in get_args(wanted):
        raise ValueError(f"{name}: unknown value {value!r}.{nearest(value, list(get_args(wanted)))}")


def check_least(name: str, value: int, least: int) -> None:
    """Raise a ValueError if a number is below `least` or not an integer."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name}: expected an int, got {type(value).__name__} {value!r}.")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}.")


def check_fraction(name: str, value: float) -> None:
    """Raise a ValueError if a number is outside [0, 1]; NaN is outside."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}.")
