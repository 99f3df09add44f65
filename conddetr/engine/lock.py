"""One training at a time in a folder: a second one would mix its files with those of the first."""

import contextlib
import errno
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from conddetr.engine import distributed
from conddetr.files import write_errors

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger(__name__)

LOCK = "run.lock"
"""File in the folder of a run; while it trains the file is locked, and says who trains."""
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system without locks answers."""
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_PLACE_ON_WINDOWS = 1 << 30
"""The byte that is locked there, behind the text: nobody else could read what is locked."""

_held: set[tuple[int, int]] = set()
"""Folders in which this process trains, by device and inode."""
_guard = threading.Lock()


@contextlib.contextmanager
def sole_run(folder: str | Path) -> Iterator[None]:
    """Keep a folder for this run until the end, or until the process is gone, however it goes.

    Under torchrun the first process holds it; every process must call this.

    Args:
        folder: of the run, created if absent.

    Raises:
        FileExistsError: another run trains there; names it. The same on every rank.
        OSError: the folder cannot be written to. The same on every rank.
    """
    with contextlib.ExitStack() as held:
        problem = None
        if distributed.is_main():
            try:
                held.enter_context(_locked(Path(folder)))
            except OSError as error:
                # One that says all by itself has no file name in it.
                unfit = f"{folder} cannot hold a run: {error.strerror}. Name another folder."
                problem = error if error.filename is None else OSError(unfit)
        # The others would go on, and wait for the first one.
        problem = distributed.gather(problem)[0]
        if problem is not None:
            raise problem
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes, and other threads of this one."""
    is_new = not folder.exists()
    with _known(folder):
        descriptor = _open_locked(folder)
        try:
            with write_errors(folder / LOCK):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _this_process().encode())
            yield
        finally:
            # While it is locked. Windows removes no file that is open, and keeps it.
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
            os.close(descriptor)
            # A run that was refused leaves nothing behind.
            with contextlib.suppress(OSError):
                if is_new:
                    folder.rmdir()


@contextlib.contextmanager
def _known(folder: Path) -> Iterator[None]:
    """Note that this process trains in a folder.

    The system's lock is one of processes, and lost when its holder closes the file, even if opened a second time.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    status = folder.stat()
    key = status.st_dev, status.st_ino
    with _guard:
        if key in _held:
            raise FileExistsError(_in_use(folder, f"another run of this process ({os.getpid()})"))
        _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)


def _open_locked(folder: Path) -> int:
    """The descriptor of the folder's file, locked."""
    while True:
        with write_errors(folder / LOCK):
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            # Its holder removes the file at the end: what was opened before that is nobody's any more.
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                log.warning("%s: its file system has no locks, a second run in it would not be refused.", folder)
                return descriptor
            holder = _text(descriptor)
            os.close(descriptor)
            if error.errno in _HELD_BY_ANOTHER:
                raise FileExistsError(_in_use(folder, holder)) from error
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock the file until it is closed or the process ends, or raise an OSError at once.

    Not `flock`, which processes that load images inherit: they live on for a while after their trainer was killed.
    """
    if sys.platform == "win32":
        os.lseek(descriptor, _PLACE_ON_WINDOWS, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _text(descriptor: int) -> str:
    """Who holds the lock, by the text of the file; it is empty for a moment after the lock was taken."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 1000).decode(errors="replace").strip() or "another run"


def _in_use(folder: Path, by: str) -> str:
    return f"{folder} is in use by {by}: wait for its end, or name another folder."
