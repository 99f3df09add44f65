"""The same as `python benchmarks/run.py train`."""

import sys

from run import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
