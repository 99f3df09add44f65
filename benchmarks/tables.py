"""The same as `python benchmarks/run.py tables`."""

import sys

from run import main

if __name__ == "__main__":
    sys.exit(main(["tables", *sys.argv[1:]]))
