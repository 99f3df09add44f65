"""The same as `python benchmarks/run.py attn`."""

import sys

from run import main

if __name__ == "__main__":
    sys.exit(main(["attn", *sys.argv[1:]]))
