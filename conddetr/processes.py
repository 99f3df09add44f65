"""Processes beside this one, that load or read images: how many, whether they can be started, and how they end."""

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
    """How many cores this process may use, as far as the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def can_start_workers() -> bool:
    """Whether other processes can be started from here; where they cannot, a warning says once why.

    A process that is not forked imports the main script. Without a guard in it, it would run the whole script again.
    """
    method, script = _start_method(), _main_script()
    return method == "fork" or script is None or _has_guard(script, method)


def _start_method() -> str:
    """Without choosing one for good, as asking for the method would."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def _main_script() -> str | None:
    """The file that a new process would import as this one's main module, as `multiprocessing` has it; None: none."""
    main = sys.modules["__main__"]
    # `python -m package` runs a `__main__.py`, which is never imported.
    if getattr(getattr(main, "__spec__", None), "name", "").rpartition(".")[2] == "__main__":
        return None
    file = getattr(main, "__file__", None)
    return None if file is None or Path(file).stem == "ipython" else file


@functools.cache
def _has_guard(script: str, method: str) -> bool:
    """Whether a script asks for `__name__` before it runs anything; true where its source is not to be had."""
    try:
        tree = ast.parse(Path(script).read_bytes())
    except (OSError, SyntaxError, ValueError):
        # A program in one file, say: it has its own way.
        return True
    names = (part for node in tree.body if isinstance(node, ast.If) for part in ast.walk(node.test))
    if any(isinstance(part, ast.Name) and part.id == "__name__" for part in names):
        return True
    log.warning(
        "Images are loaded without workers: a new process (start method %s) would run all of %s again. "
        'For workers put what it runs under `if __name__ == "__main__":`.',
        method,
        script,
    )
    return False


def ignore_interrupts(worker: int = 0) -> None:
    """In a new process: leave Ctrl-C, which reaches all processes of a terminal, to the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back; processes started here never see it, not even before they get to `ignore_interrupts`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if _start_method() != "fork":
        # Started with the first such process, it would let Ctrl-C through again.
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
