"""Commands with a time limit, killed with everything that they started, in any session."""

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
"""Seconds before its limit at which a command gets SIGINT, as by Ctrl-C, so that pytest writes its report."""
DYING = 5.0
"""Seconds that a killed process may take to end. A process that waits for a driver may never end."""
NOT_STARTED = 127
"""Exit status of a command that cannot be started, as in a shell."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """Exit status; negative: killed by that signal; None: killed at the limit."""
    seconds: float
    survivors: int
    """Number of its processes that did not end."""


def run_whole(
    command: Sequence[str],
    seconds: float,
    output: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Ended:
    """Run a command with a time limit, then kill every process that it started.

    Args:
        command: program and arguments.
        seconds: time limit, at which it is killed. A little before, it is interrupted as by Ctrl-C.
        output: file for its output.
        environment: the command's environment; default: this process's.
        folder: working directory; default: this process's.
    """
    # Children inherit the mark, in new sessions too. Every run has another name, so that nested runs keep all marks.
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
                preexec_fn=_restore_interrupts,
            )
            status = _wait(child, seconds)
        except OSError as error:
            file.write(f"{command[0]}: cannot be started: {error}\n".encode())
        finally:
            # Also after a signal during the start.
            survivors = _kill(child, mark)
    return Ended(status, time.monotonic() - start, survivors)


def _restore_interrupts() -> None:
    """Restore SIGINT, which a shell ignores for a background process and its children."""
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
    """Kill the process group and all marked processes; returns the number of those that do not end."""
    # A program may have overwritten its environment or left the group, but hardly both.
    with suppress(ProcessLookupError):
        if child is not None:
            os.killpg(child.pid, signal.SIGKILL)
    until = time.monotonic() + DYING
    while (survivors := _marked(mark)) and time.monotonic() < until:
        for process in survivors:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    if child is not None:
        child.poll()
    return len(survivors)


def _marked(mark: str) -> list[int]:
    """Ids of the processes whose environment has this variable; empty where /proc does not exist."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        # Processes may end meanwhile, and those of other users are not readable.
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                processes.append(int(folder.name))
    return processes
