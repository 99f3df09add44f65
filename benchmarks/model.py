"""The same as `python benchmarks/run.py model`."""

import sys

from run import main

if __name__ == "__main__":
    sys.exit(main(["model", *sys.argv[1:]]))
