"""The same as `python benchmarks/run.py convergence`."""

import sys

from run import main

if __name__ == "__main__":
    sys.exit(main(["convergence", *sys.argv[1:]]))
