"""A program for torchrun: the check before a run, in two processes with a null GPU each.

All numbers are wrong there, so every kernel is refused, in both processes.
"""

import sys
from pathlib import Path

from conddetr.config import PRESETS
from conddetr.engine.chosen import chosen, prove
from conddetr.engine.distributed import process_group, rank
from conddetr.kernels import records


def main() -> None:
    """Check, and write this process's choices to a separate file."""
    with process_group("cuda") as device:
        prove(device, "auto")
        choices = chosen(PRESETS["conditional-detr-r50"], "auto", device, "bfloat16", trains=True).line()
        refused = [verdict.refused for verdict in records.load(device).verdicts]
        Path(sys.argv[1], f"rank-{rank()}").write_text(f"{all(refused)} {len(refused)} {choices}")


if __name__ == "__main__":
    main()
