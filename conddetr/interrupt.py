"""Ctrl-C in the command line: no traceback, neither while PyTorch is imported nor later.

The package imports this first; it imports nothing that takes time. In the process of `conddetr …` or
`python -m conddetr`, SIGINT then ends it without a word, as it ends most programs, until `raise_again`.
"""

import os
import signal
import sys
import threading
from itertools import pairwise


class InterruptedRunError(RuntimeError):
    """A signal stopped the run after its state was saved."""


def raise_again() -> None:
    """From now on SIGINT is a KeyboardInterrupt, where importing this module changed that."""
    if _ENDS_AT_ONCE and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once() -> bool:
    """Let SIGINT end this process, if it is the command line's; says whether that was changed."""
    is_main = threading.current_thread() is threading.main_thread()
    # Not where somebody else has a handler, or where a shell that started it in the background ignores it.
    if not (is_main and _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        return False
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return True


def _is_command() -> bool:
    name = sys.argv[0] if sys.argv else ""
    if name != "-m":
        return os.path.basename(name) in ("conddetr", "conddetr.exe", "conddetr-script.py")
    # So it is called while Python imports the package whose `__main__` it is to run.
    return ("-m", "conddetr") in pairwise(sys.orig_argv)


_ENDS_AT_ONCE = _end_at_once()
