"""Run a program with GPUs that do nothing: python tests/null_gpu [--devices N] COMMAND …"""

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    """Replace this process with the program."""
    # Python puts this folder on its path, but the package is found from the folder above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from null_gpu.build import environment, why_not

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1, help="number of GPUs; default 1")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the program and its arguments")
    options = parser.parse_args()
    if not options.command:
        parser.error("expected a command")
    reason = why_not()
    if reason is not None:
        parser.error(reason)
    os.execvpe(options.command[0], options.command, environment(options.devices))


if __name__ == "__main__":
    main()
