"""Atomic writing of files, and reading of text files in several Unicode encodings."""

import abc
import codecs
import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from safetensors import SafetensorError

from conddetr import interrupt

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if hasattr(errno, "EDQUOT") else (errno.ENOSPC, errno.EFBIG)
"""System errors for lack of space: a full disk, a quota, a maximum file size."""
_BEGINNING = 1024
"""Number of bytes at the start of a file that are checked for JSON."""
_TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "inline_container")
"""The message of the RuntimeError that `torch.save` raises for failed writes contains one of these."""


@contextlib.contextmanager
def atomic_file(path: str | Path, partial: str | Path | None = None) -> Iterator[Path]:
    """Yields a temporary path to write to, which is renamed to `path` at the end. `path` holds either its old content
    or the complete new file.

    The folder is created. File and folder are on disk at the end. The file's mode is that of any new file.

    Args:
        path: the final path.
        partial: the temporary path, in the same folder; default: `path` with the suffix `.partial`.

    Raises:
        OSError: the file cannot be written; the message is that of `write_errors`.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial") if partial is None else Path(partial)
    with write_errors(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file that a killed process left may have another mode.
        partial.unlink(missing_ok=True)
        stack.callback(partial.unlink, missing_ok=True)
        # Some libraries write files that only the owner may read. A new file shows the mode that the umask gives.
        with open(partial, "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield partial
        if stat.S_IMODE(partial.stat().st_mode) != mode:
            partial.chmod(mode)
        flush(partial)
        os.replace(partial, path)
        # The new name is safe only after the folder is on disk too.
        _flush_folder(path.parent)


class KeptFile(abc.ABC):
    """A file that is written in parts, within a `with` block.

    Leaving the block completes the file, also after an exception such as Ctrl-C: it then holds all parts before. If the
    file itself cannot be written, its path keeps the old content.
    """

    def __init__(self, path: str | Path, partial: str | Path | None = None) -> None:
        """`path`, `partial`: as for `atomic_file`."""
        self.path, self._partial = Path(path), partial
        self.is_complete = False
        """Whether the file is written."""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            partial = stack.enter_context(atomic_file(self.path, self._partial))
            self._open(partial, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        # Without the block's exception: only an error of closing the file discards it.
        with interrupt.deferred():
            self._stack.close()
            self.is_complete = True

    @abc.abstractmethod
    def _open(self, partial: Path, stack: contextlib.ExitStack) -> None:
        """Open the temporary file. Its end is written, and it is closed, by callbacks of the stack."""


def refuse_overwriting(option: str, path: str | Path | None, others: Iterable[str | Path | None]) -> None:
    """Refuse to write to a file that a command also reads, or writes for another option.

    Args:
        option: the option that names the file, for the message.
        path: the file to write; None: none.
        others: files of other options; None if an option is not used.

    Raises:
        ValueError: `path` is one of the others, also under another name.
    """
    for other in others:
        if path and other and _is_same(Path(path), Path(other)):
            raise ValueError(f"{option} {path}: this is also {other}, which the command needs: name another file.")


def check_json_target(option: str, path: str | Path | None) -> None:
    """Refuse, before any work, to write JSON over a folder, or over a file that is not JSON.

    Args:
        option: the option that names the file, for the message.
        path: the file to write; None: none.

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
            raise ValueError(f"{option} {path}: the file exists and is not JSON: name another file.")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as `atomic_file` does."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str:
    """Content of a text file in UTF-8, or in the Unicode encoding of its byte order mark.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has another encoding.
    """
    return decode_text(Path(path).read_bytes())


def decode_text(content: bytes) -> str:
    """Text from the bytes of a file; see `read_text`."""
    # First, because UTF-32's mark begins with UTF-16's.
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


def _is_same(path: Path, other: Path) -> bool:
    """Whether two paths are the same file, through links too; the file need not exist."""
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns a library's error for a full disk into an OSError that names the file and the free space.

    The code inside must leave the old content of `path` intact.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if _says_enough(error):
            raise
        folder = next(folder for folder in path.parents if folder.is_dir())
        raise OSError(
            f"{path} could not be written: {_reason(error)}. Its old content is kept. "
            f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there: make room, or name another folder."
        ) from error


def _says_enough(error: Exception) -> bool:
    """Whether an error is not a write error, or names its file and a reason other than lack of space."""
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
    # The message has a position in the file, not the system's error.
    return "PyTorch's writer stopped in the middle, as it does on a full disk"


def flush(path: Path) -> None:
    """Wait until a file's content is on disk."""
    # Opened for writing: Windows flushes no other files.
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        # Windows cannot open folders, and other systems only readable ones. Then nothing more can be done.
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
