"""A lock that allows one training at a time in a folder; a second one would mix its files with those of the first."""

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
"""File in the folder of a run. During training it is locked and names the process that trains."""
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors of a file system without locks."""
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_PLACE_ON_WINDOWS = 1 << 30
"""Offset of the byte that is locked on Windows, behind the text: no other process can read locked bytes."""

_held: set[tuple[int, int]] = set()
"""Folders in which this process trains, by device and inode."""
_guard = threading.Lock()


@contextlib.contextmanager
def sole_run(folder: str | Path) -> Iterator[None]:
    """Reserve a folder for this run until the context or the process ends, even if the process is killed.

    Under torchrun the first process holds the lock; every process must call this.

    Args:
        folder: the run's folder, created if absent.

    Raises:
        FileExistsError: another run trains there; the message names it. The same on every rank.
        OSError: the folder cannot be written to. The same on every rank.
    """
    with contextlib.ExitStack() as stack:
        failure = None
        if distributed.is_main():
            try:
                stack.enter_context(_locked(Path(folder)))
            except OSError as error:
                # An error without a file name has a complete message already.
                message = f"{folder} cannot hold a run: {error.strerror}. Name another folder."
                failure = error if error.filename is None else OSError(message)
        # Otherwise the other ranks would continue and wait for the first one.
        failure = distributed.gather(failure)[0]
        if failure is not None:
            raise failure
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes and against other threads of this one."""
    is_new = not folder.exists()
    with _known(folder):
        descriptor = _open_locked(folder)
        try:
            with write_errors(folder / LOCK):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _this_process().encode())
            yield
        finally:
            # Remove it while it is locked. Windows cannot remove an open file, so there it stays.
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
            os.close(descriptor)
            # A refused run leaves no new folder behind.
            with contextlib.suppress(OSError):
                if is_new:
                    folder.rmdir()


@contextlib.contextmanager
def _known(folder: Path) -> Iterator[None]:
    """Register that this process trains in a folder.

    The system's lock is per process, and it is lost as soon as the process closes any descriptor of the file.
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
    """Descriptor of the folder's lock file, locked."""
    while True:
        with write_errors(folder / LOCK):
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            # The holder removes the file at the end: a descriptor that was opened before that locks a deleted file.
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                log.warning("%s: the file system has no locks, so a second run there would not be refused.", folder)
                return descriptor
            holder = _text(descriptor)
            os.close(descriptor)
            if error.errno in _HELD_BY_ANOTHER:
                raise FileExistsError(_in_use(folder, holder)) from error
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock the file until it is closed or the process ends, or raise an OSError at once.

    Not `flock`: data loader processes inherit it, and they outlive a killed trainer for a while.
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
    """The lock's holder, from the file's text, which is empty for a moment after the lock is taken."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 1000).decode(errors="replace").strip() or "another run"


def _in_use(folder: Path, by: str) -> str:
    return f"{folder} is in use by {by}: wait until it ends, or name another folder."
