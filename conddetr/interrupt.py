"""Ctrl-C without a traceback on the command line, neither during the import of PyTorch nor later.

The package imports this module first; it imports nothing slow. In a process of `conddetr …` or `python -m conddetr`,
SIGINT then ends the process silently, as it ends most programs, until `raise_again` is called.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise


class InterruptedRunError(RuntimeError):
    """A signal stopped the run after its state was saved."""


def raise_again() -> None:
    """Make SIGINT raise KeyboardInterrupt again if importing this module changed that."""
    if _ENDS_AT_ONCE and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C inside raises its KeyboardInterrupt at the end, for work that must not stop halfway.

    Other handlers, and other threads than the main one, are left as they are.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if received:
        raise KeyboardInterrupt


def _end_at_once() -> bool:
    """Let SIGINT end this process if it runs the command line; returns whether the handler was changed."""
    is_main = threading.current_thread() is threading.main_thread()
    # Not if there is another handler, or if the signal is ignored because a shell started it in the background.
    if not (is_main and _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        return False
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return True


def _is_command() -> bool:
    name = sys.argv[0] if sys.argv else ""
    if name != "-m":
        return os.path.basename(name) in ("conddetr", "conddetr.exe", "conddetr-script.py")
    # `-m` is the name while Python imports the package whose `__main__` it will run.
    return ("-m", "conddetr") in pairwise(sys.orig_argv)


_ENDS_AT_ONCE = _end_at_once()
