"""Run a benchmark or a tool by its name: that of its file, in whichever room it is.

python benchmarks/run.py sine --points 2400
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(arguments: list[str]) -> None:
    """Run one as if by itself."""
    name = arguments[0] if arguments else ""
    [*found] = HERE.glob(f"*/{name}.py")
    if not name or not found:
        raise SystemExit(f"expected the name of a benchmark, got {name!r}.")
    sys.argv = arguments
    runpy.run_module(f"{found[0].parent.name}.{name}", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
