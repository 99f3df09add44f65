"""Takes the project to an NVIDIA GPU, and brings back what was found there: `make gpu`. See docs/gpu.md.

    python tests/fly.py [--flight 2] [--limit SECONDS] [--steps NAME…] [--out FOLDER] [--commit HASH]

Steps in order of worth, each with a time limit; one that fails or is late costs none of the next. After each, all there
is so far lies in a few flat files in one folder. Nothing is fetched from a network.
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
"""Number → its steps, and the seconds that it may take."""


def main() -> None:
    """Fly as the options say."""
    listen()
    options = parse()
    with tempfile.TemporaryDirectory(prefix="flight-") as folder:
        work = Path(folder)
        steps = choose(options, work)
        if options.native:
            put_native(options.native)
        if options.triton_cache:
            print(f"{unpack_cache(options.triton_cache, work / 'triton-cache')} kernels come compiled")
        about = {"flight": options.flight, "commit": options.commit, "started": now(), "rehearsal": options.rehearse}
        Flight(steps, options.out.resolve(), work, environment(options, work), options.limit, about).fly()
    print(f"in {options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")


def parse() -> argparse.Namespace:
    """The options, complete; an error for what is not there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flight", type=int, choices=FLIGHTS, default=1, help="1: everything; 2: with the corrections")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of the whole flight; default: 390, second 240")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these; --list names them")
    parser.add_argument("--list", action="store_true", help="print the steps, and run none")
    parser.add_argument("--out", type=Path, help="folder of what comes back; default: build/flight-1, or -2")
    parser.add_argument("--commit", help="of this checkout, for result files; default: what git says")
    parser.add_argument("--native", type=Path, metavar="FILE", help="ready-made conddetr/_C….so; default: it is built")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="packages to install, pycocotools for example")
    parser.add_argument("--triton-cache", type=Path, metavar="FILE", help="triton-cache.tar.gz of an earlier flight")
    parser.add_argument("--failed", type=Path, metavar="FILE", help="junit.xml of an earlier flight: only what failed")
    parser.add_argument("--rehearse", action="store_true", help="small sizes: tries the way, measures nothing")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of every step's limit, for slow machines")
    options = parser.parse_args()
    for path in (options.native, options.wheels, options.triton_cache, options.failed):
        if path is not None and not path.exists():
            parser.error(f"{path}: there is no such file or folder")
    options.limit = options.limit or FLIGHTS[options.flight][1]
    options.out = options.out or ROOT / "build" / f"flight-{options.flight}"
    options.commit = options.commit or git_commit()
    if options.native and not options.native.name.endswith(sysconfig.get_config_var("EXT_SUFFIX")):
        print(f"{options.native.name} is not for this Python, the extension is built")
        options.native = None
    if not options.list and gpus() == 0:
        parser.error("there is no NVIDIA GPU here: its driver does not load, or shows none")
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


def listen() -> None:
    """Have signals end the step that runs, with this process."""
    # Steps inherit it: a shell may have its children ignore Ctrl-C, by which steps are asked to come to an end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def put_native(file: Path) -> None:
    """Copy a ready-made extension into the package."""
    target = ROOT / "conddetr" / file.name
    if not (target.exists() and target.samefile(file)):
        # A library that some process has loaded is replaced, not overwritten.
        shutil.copyfile(file, target.with_suffix(".part"))
        target.with_suffix(".part").replace(target)


def environment(options: argparse.Namespace, work: Path) -> dict[str, str]:
    """Of every step."""
    inherited = dict(os.environ)
    # This checkout without being installed, which needs packages that a GPU's Python may lack.
    paths = [str(ROOT / "tests" / "flight" / "link"), str(work / "wheels"), inherited.get("PYTHONPATH", "")]
    return {
        **inherited,
        "CONDDETR_COMMIT": options.commit,
        "TRITON_CACHE_DIR": str(work / "triton-cache"),
        "CONDDETR_CACHE": str(work / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # What a step wrote before it was killed is kept.
        "PYTHONUNBUFFERED": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
    }


def gpus() -> int:
    """NVIDIA GPUs that the driver shows; asked without PyTorch, which takes seconds to import."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    is_good = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if is_good else 0


def git_commit() -> str:
    """The commit that is checked out, "unknown" where git does not say."""
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
