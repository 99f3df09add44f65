"""Runs scripts one after the other in one process, which imports PyTorch once; one that fails does not cost the next.

    python tests/flight/several.py -- SCRIPT [ARGUMENT…] [-- SCRIPT [ARGUMENT…]]…

The exit status is 1 if any failed.
"""

import runpy
import sys
import traceback
from itertools import groupby
from pathlib import Path


def main() -> None:
    """Run all."""
    commands = [list(words) for is_break, words in groupby(sys.argv[1:], lambda word: word == "--") if not is_break]
    failed = [command[0] for command in commands if not succeeds(command)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def succeeds(command: list[str]) -> bool:
    """Run a script as if by itself; whether it ended well."""
    print("=====", *command, flush=True)
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent.resolve())
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code)
        return stop.code in (None, 0)
    except Exception:
        # Whatever it is, the next script is another matter.
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    main()
