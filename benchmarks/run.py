"""Run benchmarks, or one tool, by the names of their files.

python benchmarks/run.py ops                        # every operation
python benchmarks/run.py attn sine --rounds 20      # some of them; flags apply to each
python benchmarks/run.py attn --help                # the flags of one
python benchmarks/run.py predict --no-problems
"""

import importlib
import sys
import textwrap
import traceback
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
OPERATIONS = {path.stem: "ops" for path in sorted((HERE / "ops").glob("[!_]*.py"))}
TIMED = {**OPERATIONS, "decoder": "models", "model": "models", "train": "models"}
"""Benchmark → its folder. They share flags, so several may be named."""
PROGRAMS = {
    **dict.fromkeys(("scaling", "checkpoint", "evaluation", "data", "annotations"), "models"),
    **dict.fromkeys(("tables", "convergence", "figure1"), "paper"),
    **dict.fromkeys(("report", "measured"), "harness"),
    "step": "counts",
    "predict": "gpu_model",
    **dict.fromkeys(("tune", "aot", "aot_cuda"), "tools"),
}
"""Benchmark or tool that must be named alone → its folder."""
ALL = "ops"
"""Stands for every operation."""
USAGE = f"""{__doc__}
One or several of
{textwrap.fill(", ".join((ALL, *TIMED)), 100)};
or one of
{textwrap.fill(", ".join(PROGRAMS), 100)}."""


def main(words: list[str]) -> int:
    """Run the benchmarks or the tool that the first words name, with the flags that follow; return the exit status."""
    names = list(takewhile(lambda word: word in (ALL, *TIMED, *PROGRAMS), words))
    flags = words[len(names) :]
    if not names:
        if flags in (["--help"], ["-h"]):
            print(USAGE)
            return 0
        return refused(f"there is no benchmark {flags[0]}" if flags else "expected the name of a benchmark")
    alone = [name for name in names if name in PROGRAMS]
    if alone and len(names) > 1:
        return refused(f"{alone[0]} must be named alone, got {' '.join(names)}")
    if alone:
        return imported(alone[0]).main(flags) or 0
    if names != [ALL] and len(names) == 1:
        prepared(names[0], flags)()
        return 0
    return run_several(names, flags)


def refused(why: str) -> int:
    """Print why nothing runs, and return the exit status."""
    print(f"{USAGE}\n\nrun.py: {why}.", file=sys.stderr)
    return 2


def run_several(names: list[str], flags: list[str]) -> int:
    """Run benchmarks in turn in this process, which imports PyTorch once; a failure does not stop the next."""
    chosen = dict.fromkeys(name for word in names for name in (OPERATIONS if word == ALL else [word]))
    runs, failed = {}, []
    for name in chosen:
        # All flags are parsed before anything is timed.
        try:
            why_not = imported(name).Problem.why_not
        except ImportError:
            traceback.print_exc()
            failed.append(name)
            continue
        if why_not is not None and name not in names:
            print(f"{name}: {why_not}")
            continue
        runs[name] = prepared(name, flags)
    for name, run in runs.items():
        print("=====", name, flush=True)
        if not succeeds(run):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def succeeds(run: Callable[[], None]) -> bool:
    """Run a benchmark and return whether it succeeded."""
    try:
        run()
    except SystemExit as stop:
        print(stop.code)
        return False
    except Exception:
        # No error of one benchmark may stop the next.
        traceback.print_exc()
        return False
    return True


def prepared(name: str, flags: list[str]) -> Callable[[], None]:
    """Parse the flags of a benchmark and return the function that runs it."""
    # Imported here because it imports PyTorch.
    from harness.benchmark import prepare

    return prepare(name, imported(name), flags)


def imported(name: str) -> ModuleType:
    """The module of a benchmark or a tool."""
    folder = (TIMED | PROGRAMS)[name]
    return importlib.import_module(f"{folder}.{name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
