"""Commands with a time limit, killed whole: with all that they started, in whatever session that is."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE = 3.0
"""Seconds before its limit when a command gets the signal of Ctrl-C: pytest writes its report then."""
DYING = 5.0
"""Seconds that a killed process may take to go. One that waits for a driver may never do."""
NOT_STARTED = 127
"""Exit status of a command that cannot be started, as in a shell."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """Exit status, negative: killed by that signal; None: the time was up."""
    seconds: float
    survivors: int
    """Processes of it that did not die."""


def run_whole(
    command: Sequence[str],
    seconds: float,
    output: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Ended:
    """Run a command for so many seconds at most; at its end nothing that it started lives on.

    Args:
        command: program and arguments.
        seconds: after which it is killed. A little before, it is interrupted as by Ctrl-C.
        output: file for what it writes.
        environment: of the command; default: this process's.
        folder: where it runs; default: here.
    """
    # Children inherit it, in sessions of their own too. The name differs, so that runs within runs keep all marks.
    mark = f"RUN_WHOLE_{uuid.uuid4().hex}"
    environment = {**(os.environ if environment is None else environment), mark: "1"}
    start, status, child = time.monotonic(), NOT_STARTED, None
    with output.open("wb") as file:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )
            status = _wait(child, seconds)
        except OSError as error:
            file.write(f"{command[0]}: cannot be started: {error}\n".encode())
        finally:
            # Also if a signal came while it was started.
            survivors = _kill(child, mark)
    return Ended(status, time.monotonic() - start, survivors)


def _heed_interrupts() -> None:
    """A shell that starts us in the background ignores Ctrl-C for all that we start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(child: subprocess.Popen, seconds: float) -> int | None:
    grace = min(GRACE, seconds / 4)
    with suppress(subprocess.TimeoutExpired):
        return child.wait(seconds - grace)
    child.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        child.wait(grace)
    return None


def _kill(child: subprocess.Popen | None, mark: str) -> int:
    """Kill the group and all that is marked, until there is nothing left; how many are left all the same."""
    # A program may have overwritten its environment, or have left the group, but hardly both.
    with suppress(ProcessLookupError):
        if child is not None:
            os.killpg(child.pid, signal.SIGKILL)
    until = time.monotonic() + DYING
    while (left := _marked(mark)) and time.monotonic() < until:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    if child is not None:
        child.poll()
    return len(left)


def _marked(mark: str) -> list[int]:
    """Processes whose environment has this variable; none where the system does not show them (Linux does)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # Processes end while one looks, and others' are not shown.
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found
