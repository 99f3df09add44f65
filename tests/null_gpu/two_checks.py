"""A program for torchrun: the check before a run, in two processes that have a null GPU each.

Nothing is right there, so everything is refused, in both processes alike.
"""

import sys
from pathlib import Path

from conddetr.config import PRESETS
from conddetr.engine.chosen import chosen, prove
from conddetr.engine.distributed import process_group, rank
from conddetr.kernels import records


def main() -> None:
    """Check, and write what this process then chooses to a file of its own."""
    with process_group("cuda") as device:
        prove(device, "auto")
        found = chosen(PRESETS["conditional-detr-r50"], "auto", device, "bfloat16", trains=True).line()
        refused = [verdict.refused for verdict in records.load(device).verdicts]
        Path(sys.argv[1], f"rank-{rank()}").write_text(f"{all(refused)} {len(refused)} {found}")


if __name__ == "__main__":
    main()
