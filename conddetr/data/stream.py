"""The lists of a large JSON file, one part at a time; memory holds one part of any content.

A part is cut between two elements. Decoding the part shows whether the cut is right: a cut inside an element or a
string leaves something open.
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
"""Approximate bytes of a part; more only if an element is larger."""
_SMALL = 1 << 16
"""Bytes up to which every possible cut is tried."""
_TRIES = 4
"""Cuts that are tried in larger parts: ends of the list from the start on, gaps between elements from the end on."""
_KEY = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:\s*')
_LAST = re.compile(rb"\}\s*\](?=\s*[,}])")
_BETWEEN = re.compile(rb"\}\s*,\s*\Z")
_WIDEST = 200
"""Maximum bytes between two objects, with the indentation of printed files."""


class UnusualError(ValueError):
    """This reader cannot read the file, which may nevertheless be valid."""


def lists_of(path: Path, kinds: Mapping[str, type]) -> Iterator[tuple[str, list]]:
    """The elements of some lists in the outermost object of a file, in the order of the file.

    Args:
        path: JSON in UTF-8.
        kinds: by key, the class of the elements, which must be objects.

    Yields:
        Key and elements of a part: all of that class, or, if one of them does not fit it, each as a `Raw`. An empty
        list yields an empty part.

    Raises:
        UnusualError: the file is not JSON in UTF-8, or a key's value is not a list of objects.
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
                raise UnusualError(f"{quoted!r} is repeated")
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
    """The next bytes of a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.text = file, b""

    def fill(self, size: int) -> bool:
        """Read ahead up to this many bytes; returns whether there may be more."""
        if len(self.text) < size:
            self.text += self._file.read(size - len(self.text))
        return len(self.text) >= size

    def skip(self, pattern: re.Pattern, is_needed: bool = True) -> re.Match | None:
        """Skip the next bytes if they match the pattern."""
        self.fill(_SMALL)
        match = pattern.match(self.text)
        if match:
            self.text = self.text[match.end() :]
        elif is_needed:
            raise UnusualError(f"expected {pattern.pattern!r}")
        return match

    def skip_value(self) -> None:
        """Skip one value of any type."""
        size, is_more = _SMALL, True
        while is_more:
            is_more = self.fill(size)
            try:
                # One character per byte, so that positions in text and bytes agree; only structure counts here.
                _, end = _LENIENT.raw_decode(self.text.decode("latin-1"))
            except (ValueError, RecursionError):
                end = 0
            # A number that ends with the window may continue after it.
            if 0 < end < len(self.text):
                _check_utf8(self.text[:end])
                self.text = self.text[end:]
                return
            size *= 4
        raise UnusualError("a value does not end")


_LENIENT = json.JSONDecoder(strict=False)


def _check_utf8(text: bytes) -> None:
    """Raise an `UnusualError` for text that is not UTF-8; msgspec does not check the strings that it skips."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UnusualError(str(error)) from error


def _parts(window: _Window, decoder: msgspec.json.Decoder) -> Iterator[list]:
    """The elements of the list at the start of the window, part by part."""
    window.skip(re.compile(rb"\["))
    if window.skip(re.compile(rb"\s*\]"), is_needed=False):
        yield []
        return
    is_last = False
    while not is_last:
        size = PART
        is_more = window.fill(size)
        while (result := _next_part(window.text, decoder)) is None:
            if not is_more:
                raise UnusualError("a list does not end, or has elements other than objects")
            size *= 4
            is_more = window.fill(size)
        part, end, is_last = result
        _check_utf8(window.text[:end])
        window.text = window.text[end:]
        yield part


def _next_part(text: bytes, decoder: msgspec.json.Decoder) -> tuple[list, int, bool] | None:
    """Elements from the start of `text`, the position after them, and whether they end their list; None if no element
    ends in it.

    Near the end of a list whose elements contain lists, the last candidates in the text are not valid cuts; smaller and
    smaller parts lead to a valid one.
    """
    size = len(text)
    while size:
        tries = _TRIES if size > _SMALL else size
        for cut in islice(_LAST.finditer(text, 0, size), tries):
            part = _decoded(b"[" + text[: cut.end()], decoder)
            if part is not None:
                return part, cut.end(), True
        for cut in islice(_cuts_between(text, size), tries):
            part = _decoded(b"[" + text[: cut.start() + 1] + b"]", decoder)
            if part is not None:
                return part, cut.end(), False
        size = size // 2 if size > _SMALL else 0
    return None


def _cuts_between(text: bytes, end: int) -> Iterator[re.Match]:
    """Positions where one object may end and the next begin, from the last to the first."""
    while (end := text.rfind(b"{", 0, end)) >= 0:
        if match := _BETWEEN.search(text, max(0, end - _WIDEST), end):
            yield match


def _decoded(text: bytes, decoder: msgspec.json.Decoder) -> list[Any] | None:
    """The list, its elements as `Raw` if they do not fit the class; None if the text is not JSON."""
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
