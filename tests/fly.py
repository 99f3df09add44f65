"""Tests and measures the project on an NVIDIA GPU, and packs the results: `make gpu`. See docs/gpu.md.

    python tests/fly.py [--flight 2] [--limit SECONDS] [--steps NAME…] [--out FOLDER] [--commit HASH]

Steps run in order of importance, each with a time limit. A step that fails or is late does not stop the others. After
each step the results so far are packed into a few files in one folder. Nothing is loaded from a network.
"""

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from flight.packing import unpack_cache
from flight.runner import ROOT, Flight
from flight.steps import Setup, Step, first_flight, second_flight

FLIGHTS = {1: (first_flight, 390.0), 2: (second_flight, 240.0)}
"""Number → steps, and the time limit in seconds."""


def main() -> None:
    """Run the flight that the options choose."""
    handle_signals()
    options = parse()
    with tempfile.TemporaryDirectory(prefix="flight-") as folder:
        work = Path(folder)
        steps = choose(options, work)
        if options.native:
            install_native(options.native)
        if options.triton_cache:
            print(f"{unpack_cache(options.triton_cache, work / 'triton-cache')} kernels are compiled already")
        about = {"flight": options.flight, "commit": options.commit, "started": now(), "rehearsal": options.rehearse}
        Flight(steps, options.out.resolve(), work, environment(options, work), options.limit, about).run()
    print(f"in {options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")


def parse() -> argparse.Namespace:
    """The options with their defaults; an error for a missing file or a missing GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flight", type=int, choices=FLIGHTS, default=1, help="1: everything; 2: after corrections")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for the whole flight; default: 390, second 240")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="run these steps only; --list prints their names")
    parser.add_argument("--list", action="store_true", help="print the steps and exit")
    parser.add_argument("--out", type=Path, help="folder for the results; default: build/flight-1, or -2")
    parser.add_argument("--commit", help="commit of this checkout, for result files; default: git's")
    parser.add_argument("--native", type=Path, metavar="FILE", help="prebuilt conddetr/_C….so; default: build it")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels to install, for example pycocotools")
    parser.add_argument("--triton-cache", type=Path, metavar="FILE", help="triton-cache.tar.gz of an earlier flight")
    parser.add_argument("--failed", type=Path, metavar="FILE", help="junit.xml of a flight: run only its failed tests")
    parser.add_argument("--rehearse", action="store_true", help="small sizes: run every step, measure nothing")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies each step's limit, for slow machines")
    options = parser.parse_args()
    for path in (options.native, options.wheels, options.triton_cache, options.failed):
        if path is not None and not path.exists():
            parser.error(f"{path}: no such file or folder")
    options.limit = options.limit or FLIGHTS[options.flight][1]
    options.out = options.out or ROOT / "build" / f"flight-{options.flight}"
    options.commit = options.commit or git_commit()
    if options.native and not options.native.name.endswith(sysconfig.get_config_var("EXT_SUFFIX")):
        print(f"{options.native.name} is not for this Python: the extension is built here")
        options.native = None
    if not options.list and gpus() == 0:
        parser.error("no NVIDIA GPU: the driver does not load, or lists none")
    return options


def choose(options: argparse.Namespace, work: Path) -> list[Step]:
    """The steps to run."""
    wheels, failed = (path and path.resolve() for path in (options.wheels, options.failed))
    setup = Setup(sys.executable, work, options.native is not None, wheels, failed, options.rehearse)
    steps = FLIGHTS[options.flight][0](setup)
    if options.list:
        for step in steps:
            print(f"{step.name:<14} {step.seconds:>4.0f} s  {step.purpose}")
        raise SystemExit
    unknown = set(options.steps or ()) - {step.name for step in steps}
    if unknown:
        raise SystemExit(f"--steps: expected some of {', '.join(s.name for s in steps)}, got {', '.join(unknown)}")
    steps = [step for step in steps if not options.steps or step.name in options.steps]
    return [replace(step, seconds=options.patience * step.seconds) for step in steps]


def handle_signals() -> None:
    """Make SIGINT and SIGTERM end this process and the running step."""
    # Steps inherit this. A shell may make its children ignore Ctrl-C, which interrupts a step at its limit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def install_native(file: Path) -> None:
    """Copy a prebuilt extension into the package."""
    target = ROOT / "conddetr" / file.name
    if not (target.exists() and target.samefile(file)):
        # Replaced, not overwritten: a process may have loaded the library.
        shutil.copyfile(file, target.with_suffix(".part"))
        target.with_suffix(".part").replace(target)


def environment(options: argparse.Namespace, work: Path) -> dict[str, str]:
    """The environment of every step."""
    inherited = dict(os.environ)
    # Imports this checkout without installing it, which would need packages that the Python there may lack.
    paths = [str(ROOT / "tests" / "flight" / "link"), str(work / "wheels"), inherited.get("PYTHONPATH", "")]
    return {
        **inherited,
        "CONDDETR_COMMIT": options.commit,
        "TRITON_CACHE_DIR": str(work / "triton-cache"),
        "CONDDETR_CACHE": str(work / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # Keeps the output of a step that is killed.
        "PYTHONUNBUFFERED": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
    }


def gpus() -> int:
    """Number of NVIDIA GPUs that the driver lists; without PyTorch, which takes seconds to import."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    is_good = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if is_good else 0


def git_commit() -> str:
    """The commit that is checked out, or "unknown"."""
    try:
        run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def now() -> str:
    """The date and time, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    main()
