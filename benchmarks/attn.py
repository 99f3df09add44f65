"""The same as `python benchmarks/run.py attn`."""

import sys

from run import main

if __name__ == "__main__":
    main(["attn", *sys.argv[1:]])
