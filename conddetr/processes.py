"""Worker processes that load or read images: how many, whether they can be started, and how they handle Ctrl-C."""

import ast
import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

log = logging.getLogger(__name__)


def cores() -> int:
    """Number of cores that this process may use, as far as the system reports it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def can_start_workers() -> bool:
    """Whether worker processes can be started; if not, a warning says why, once.

    A process that is not forked imports the main script. Without a guard in the script, it would run all of it again.
    """
    method, script = _start_method(), _main_script()
    return method == "fork" or script is None or _has_guard(script, method)


def _start_method() -> str:
    """The start method, without fixing it, as `get_start_method` alone would do."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def _main_script() -> str | None:
    """The file that a new process would import as the main module, by `multiprocessing`'s rules; None: none."""
    main = sys.modules["__main__"]
    # `python -m package` runs a `__main__.py`, which is never imported.
    if getattr(getattr(main, "__spec__", None), "name", "").rpartition(".")[2] == "__main__":
        return None
    file = getattr(main, "__file__", None)
    return None if file is None or Path(file).stem == "ipython" else file


@functools.cache
def _has_guard(script: str, method: str) -> bool:
    """Whether a script tests `__name__` at its top level; true if its source is not available."""
    try:
        tree = ast.parse(Path(script).read_bytes())
    except (OSError, SyntaxError, ValueError):
        # For example a program packed into one file, which handles new processes itself.
        return True
    names = (part for node in tree.body if isinstance(node, ast.If) for part in ast.walk(node.test))
    if any(isinstance(part, ast.Name) and part.id == "__name__" for part in names):
        return True
    log.warning(
        "Images are loaded without workers: a new process (start method %s) would run all of %s again. "
        'To use workers, put its main code under `if __name__ == "__main__":`.',
        method,
        script,
    )
    return False


def ignore_interrupts(worker: int = 0) -> None:
    """In a new process, ignore Ctrl-C, which reaches all processes of a terminal: the parent process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Block Ctrl-C; processes started inside never receive it, not even before they call `ignore_interrupts`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if _start_method() != "fork":
        # Otherwise it starts with the first such process, and its start would unblock Ctrl-C.
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
