"""Files written whole or not at all, and texts read in the encodings that they come in."""

import codecs
import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if hasattr(errno, "EDQUOT") else (errno.ENOSPC, errno.EFBIG)
"""Errors of a system that has no room for a file: a full disk, a quota, a largest size."""
_BEGINNING = 1024
"""Bytes of a file in which JSON shows."""
_TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "inline_container")
"""One of these is in what `torch.save` says of a file that it could not write, a RuntimeError."""


@contextlib.contextmanager
def atomic_file(path: str | Path, partial: str | Path | None = None) -> Iterator[Path]:
    """A name to write to; at the end it becomes `path`, which holds either what it held before or the whole new file.

    The folder is created; file and folder are on the disk when this ends. The file's mode is that of any new file.

    Args:
        path: of the file.
        partial: the name to write to, in the same folder; default: `path` with `.partial` behind it.

    Raises:
        OSError: the file cannot be written, as `write_errors` says it.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial") if partial is None else Path(partial)
    with write_errors(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What a killed process left has a mode of its own.
        partial.unlink(missing_ok=True)
        stack.callback(partial.unlink, missing_ok=True)
        # Some libraries write files that nobody else may read. What the umask grants is known from a new file.
        with open(partial, "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield partial
        if stat.S_IMODE(partial.stat().st_mode) != mode:
            partial.chmod(mode)
        flush(partial)
        os.replace(partial, path)
        # The new name is safe only when the folder is on the disk too.
        _flush_folder(path.parent)


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


def check_json_target(option: str, path: str | Path | None) -> None:
    """Refuse, before any work, to write JSON in place of a folder, or of a file that holds something else.

    Args:
        option: that names the file, for the message.
        path: to be written; None: nothing is.

    Raises:
        ValueError: there is such a folder or file.
    """
    if not path:
        return
    if Path(path).is_dir():
        raise ValueError(f"{option} {path}: expected a name for a JSON file, got a folder.")
    if Path(path).is_file():
        with open(path, "rb") as file:
            start = file.read(_BEGINNING).lstrip()
        if start and not start.startswith((b"{", b"[", codecs.BOM_UTF8)):
            raise ValueError(f"{option} {path}: the file is there, and holds no JSON: name another file.")


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
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"expected UTF-8, got byte 0x{content[error.start]:02x} at line {line} (byte {error.start}): save the "
            "file as UTF-8"
        ) from error


def _is_same(one: Path, other: Path) -> bool:
    """Whether two names are of one file, which may have several, or is yet to come."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Whatever a library raises when the disk is full becomes an OSError that names the file and says what is free.

    Inside, `path` must keep what it held before.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if _says_enough(error):
            raise
        folder = next(folder for folder in path.parents if folder.is_dir())
        raise OSError(
            f"{path} could not be written: {_reason(error)}. What was there before is kept. "
            f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there: make room, or name another folder."
        ) from error


def _says_enough(error: Exception) -> bool:
    """Whether an error is not of writing, or names its file and a reason other than room."""
    if isinstance(error, OSError):
        return error.errno not in _NO_ROOM and (error.errno is None or error.filename is not None)
    if isinstance(error, SafetensorError):
        return "I/O error" not in str(error)
    return not any(words in str(error) for words in _TORCH_WRITER)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error).splitlines()[0].rstrip(".")
    # It names a position in the file, not the error of the system.
    return "PyTorch's writer was stopped in the middle, as by a full disk"


def flush(path: Path) -> None:
    """Wait until what a file holds is on the disk."""
    # To be written to: Windows flushes no other files.
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        # Windows opens no folders, and others only those that may be read: the name is then as safe as can be.
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
