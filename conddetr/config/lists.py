"""Options whose text is a list: names or patterns separated by commas, and patterns with a number."""

import math


def entries(option: str, text: str) -> list[str]:
    """The comma-separated entries of an option, without the spaces around them; none for an empty text.

    Args:
        option: its name, for messages.
        text: its value.

    Raises:
        ValueError: an entry is empty or given twice.
    """
    names = [entry.strip() for entry in text.split(",")] if text.strip() else []
    if "" in names:
        raise ValueError(f"{option}: expected entries separated by single commas, got {text!r}.")
    for number, entry in enumerate(names):
        if entry in names[:number]:
            raise ValueError(f"{option}: {entry!r} is given twice in {text!r}.")
    return names


def rates(option: str, text: str) -> dict[str, float]:
    """The patterns of a list `pattern=rate, pattern=rate`, with their learning rates, in order.

    Args:
        option: its name, for messages.
        text: its value.

    Raises:
        ValueError: an entry is not of this form, a rate is not a positive finite number, or as `entries`.
    """
    by_pattern: dict[str, float] = {}
    for entry in entries(option, text):
        pattern, _, number = (part.strip() for part in entry.rpartition("="))
        try:
            rate = float(number)
        except ValueError:
            rate = math.nan
        if not pattern or not (math.isfinite(rate) and rate > 0):
            raise ValueError(
                f"{option}: expected PATTERN=RATE with a positive learning rate, got {entry!r}. To hold parameters "
                "still, use freeze."
            )
        if pattern in by_pattern:
            raise ValueError(f"{option}: {pattern!r} is given twice in {text!r}.")
        by_pattern[pattern] = rate
    return by_pattern
