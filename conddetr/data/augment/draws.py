"""Random numbers from `random()` alone, the only method of a generator that Python promises not to change."""

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def coin(generator: Random) -> bool:
    """True with probability 1/2."""
    return generator.random() < 0.5


def uniform(low: float, high: float, generator: Random) -> float:
    """Uniform in [low, high)."""
    return low + (high - low) * generator.random()


def integer(low: int, high: int, generator: Random) -> int:
    """Uniform in [low, high]."""
    return low + int(generator.random() * (high - low + 1))


def choice(values: Sequence[T], generator: Random) -> T:
    """One of the values, all equally likely."""
    return values[integer(0, len(values) - 1, generator)]
