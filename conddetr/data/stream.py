"""The lists of a large JSON file, a part at a time: memory stays that of a part, whatever stands in the file.

A part is cut where one element ends and the next begins. Whether a cut is such a place is known when the part is
decoded: one inside an element, or inside a text, leaves something open.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Raw

PART = 1 << 19
"""Bytes of a part, about; more only where one element is larger."""
_SMALL = 1 << 16
"""Bytes in which every place is tried."""
_TRIES = 4
"""Places that are tried in larger parts, from each end."""
_KEY = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:\s*')
_LAST = re.compile(rb"\}\s*\](?=\s*[,}])")
_BETWEEN = re.compile(rb"\}\s*,\s*\Z")
_WIDEST = 200
"""Bytes between two objects, with the indentation of printed files."""


class UnusualError(ValueError):
    """This reader does not understand the file, which may be right or wrong all the same."""


def lists_of(path: Path, kinds: Mapping[str, type]) -> Iterator[tuple[str, list]]:
    """The elements of some lists in the outermost object of a file, in the order of the file.

    Args:
        path: JSON in UTF-8.
        kinds: by key, the class of the elements, which must be objects.

    Yields:
        Key and elements of a part: of that class, or, where one of them is not, each as a `Raw`. An empty list
        gives an empty part.

    Raises:
        UnusualError: the file is no JSON, or has other values under the keys than lists of objects.
    """
    decoders = {key: msgspec.json.Decoder(list[kind]) for key, kind in kinds.items()}
    with open(path, "rb") as file:
        window = _Window(file)
        seen: set[bytes] = set()
        window.skip(re.compile(rb"(?:%b)?\s*\{" % codecs.BOM_UTF8))
        while not window.skip(re.compile(rb"\s*\}\s*\Z"), is_needed=False):
            if seen:
                window.skip(re.compile(rb"\s*,"))
            quoted = window.skip(_KEY)[1]
            if quoted in seen:
                raise UnusualError(f"{quoted!r} stands there twice")
            seen.add(quoted)
            key = _text(quoted)
            if key in decoders:
                for part in _parts(window, decoders[key]):
                    yield key, part
            else:
                window.skip_value()


_RAW = msgspec.json.Decoder(list[Raw])


def _text(quoted: bytes) -> str:
    try:
        return json.loads(quoted)
    except ValueError as error:
        raise UnusualError(str(error)) from error


class _Window:
    """What of a file is ahead."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.text = file, b""

    def fill(self, size: int) -> bool:
        """Have so many bytes ahead, or all that there are; whether there may be more."""
        if len(self.text) < size:
            self.text += self._file.read(size - len(self.text))
        return len(self.text) >= size

    def skip(self, pattern: re.Pattern, is_needed: bool = True) -> re.Match | None:
        """Go past what stands ahead, where it is what the pattern says."""
        self.fill(_SMALL)
        found = pattern.match(self.text)
        if found:
            self.text = self.text[found.end() :]
        elif is_needed:
            raise UnusualError(f"expected {pattern.pattern!r}")
        return found

    def skip_value(self) -> None:
        """Go past one value of any kind."""
        size, is_more = _SMALL, True
        while is_more:
            is_more = self.fill(size)
            try:
                # One character a byte, so that places are the same in both; only structure counts here.
                _, end = _LENIENT.raw_decode(self.text.decode("latin-1"))
            except (ValueError, RecursionError):
                end = 0
            # A number that reaches up to the end of the window may go on behind it.
            if 0 < end < len(self.text):
                self.text = self.text[end:]
                return
            size *= 4
        raise UnusualError("a value that does not end")


_LENIENT = json.JSONDecoder(strict=False)


def _parts(window: _Window, decoder: msgspec.json.Decoder) -> Iterator[list]:
    """The elements of a list that stands ahead."""
    window.skip(re.compile(rb"\["))
    if window.skip(re.compile(rb"\s*\]"), is_needed=False):
        yield []
        return
    is_last = False
    while not is_last:
        size = PART
        is_more = window.fill(size)
        while (found := _next_part(window.text, decoder)) is None:
            if not is_more:
                raise UnusualError("a list that does not end, or not of objects")
            size *= 4
            is_more = window.fill(size)
        part, end, is_last = found
        window.text = window.text[end:]
        yield part


def _next_part(text: bytes, decoder: msgspec.json.Decoder) -> tuple[list, int, bool] | None:
    """Elements from the beginning of `text`, where it goes on behind them, and whether they end their list; None: no
    element ends in it.

    Near the end of a list whose elements have lists of their own the last places in the text are no places to cut:
    smaller and smaller parts come to one that is.
    """
    size = len(text)
    while size:
        tries = _TRIES if size > _SMALL else size
        for found in islice(_LAST.finditer(text, 0, size), tries):
            part = _decoded(b"[" + text[: found.end()], decoder)
            if part is not None:
                return part, found.end(), True
        for found in islice(_places_between(text, size), tries):
            part = _decoded(b"[" + text[: found.start() + 1] + b"]", decoder)
            if part is not None:
                return part, found.end(), False
        size = size // 2 if size > _SMALL else 0
    return None


def _places_between(text: bytes, end: int) -> Iterator[re.Match]:
    """Where one object may end and the next begin, the last place first."""
    while (end := text.rfind(b"{", 0, end)) >= 0:
        if found := _BETWEEN.search(text, max(0, end - _WIDEST), end):
            yield found


def _decoded(text: bytes, decoder: msgspec.json.Decoder) -> list[Any] | None:
    """The list, or None where that is no JSON."""
    try:
        return decoder.decode(text)
    except msgspec.ValidationError:
        pass
    except (msgspec.DecodeError, RecursionError):
        return None
    try:
        return _RAW.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
