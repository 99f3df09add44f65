"""Files written whole or not at all, and texts read in the encodings that they come in."""

import codecs
import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A name to write to; at the end it becomes `path`, which holds either what it held before or the whole new file.

    The folder is created; file and folder are on the disk when this ends.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
        # The new name is safe only when the folder is on the disk too.
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def refuse_overwriting(option: str, path: str | Path | None, others: Iterable[str | Path | None]) -> None:
    """Refuse to write to a file that a command also reads, or writes something else to.

    Args:
        option: that names the file, for the message.
        path: to be written; None: nothing is.
        others: files of other options, under any name; None where an option is not used.

    Raises:
        ValueError: the path is one of them.
    """
    for other in others:
        if path and other and _is_same(Path(path), Path(other)):
            raise ValueError(f"{option} {path}: this is also {other}, which the command needs: name another file.")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as `atomic_file` does."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, or in the Unicode encoding that its byte order mark names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is in no such encoding.
    """
    return decode_text(Path(path).read_bytes())


def decode_text(content: bytes) -> str:
    """The bytes of a text file; see `read_text`."""
    # UTF-32's mark begins with UTF-16's.
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return content.decode("utf-32")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig")


def _is_same(one: Path, other: Path) -> bool:
    """Whether two names are of one file, which may have several, or is yet to come."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
