"""The steps of the two flights, in order of importance, each with its time limit."""

import importlib.util
import os
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, replace
from pathlib import Path

DEVICE_TESTS = (
    "tests/kernels",
    "tests/loss",
    "tests/model",
    "tests/data/test_device_decoder.py",
    "tests/engine/test_graphs.py",
    "tests/engine/test_no_wait.py",
    "tests/interop/huggingface/test_accelerate.py",
    "tests/interop/huggingface/test_fast.py",
    "tests/interop/huggingface/test_graphs.py",
    "tests/viz/test_attention.py",
    "tests/test_export.py",
    "tests/test_cli.py",
    "tests/test_graphed.py",
)
"""Files and folders with tests marked `gpu`: tests that behave differently on a CUDA device."""
DEVICE_ONLY = (
    "-m",
    "gpu",
    "-k",
    "not (test_match and native) and not instruction_set and not simulated_gpu",
)
"""Options that leave out tests of the CPU alone."""
PROCESSES = 12
"""Number of processes that share the tests, if pytest-xdist is installed."""
SMALL = {
    "train": ("--size", "96", "128", "--batch", "1", "--rounds", "1"),
    "attn": ("--grids", "r50", "--batch", "1", "--dtypes", "bfloat16", "--dropout", "0.1", "--rounds", "1"),
    "decoder": ("--batch", "1", "--rounds", "1"),
    "model": ("--size", "96", "128", "--rounds", "1"),
    "tune": ("--seconds", "1"),
    "data": ("--rounds", "1"),
}
"""Benchmark → options with which it ends soon and measures nothing."""
KERNELS = ("sine", "match", "focal", "boxes", "cost", "prediction", "errors", "position", "pool", "bits", "query")
"""Benchmarks of the small kernels."""
SMALL_TESTS = ("tests/kernels/test_sine.py", "tests/kernels/test_boxes.py", "tests/engine/test_graphs.py")


@dataclass(frozen=True)
class Step:
    """One command of a flight."""

    name: str
    command: tuple[str, ...]
    seconds: float
    """Time limit, at which it is killed."""
    purpose: str


@dataclass(frozen=True)
class Setup:
    """The options of a flight that its commands depend on."""

    python: str
    """The interpreter with the PyTorch to test."""
    work: Path
    """Folder that steps write to: `junit.xml`, `results/`, `triton-cache/`, `wheels/`."""
    has_native: bool = False
    """Whether the extension is built already."""
    wheels: Path | None = None
    """Folder of wheels to install."""
    failed: Path | None = None
    """The `junit.xml` of an earlier flight, whose failed tests run again; None: all tests run."""
    small: bool = False
    """Whether sizes are small: to rehearse, not to measure."""

    def script(self, path: str, *arguments: str | Path) -> tuple[str, ...]:
        """The command of a script of this repository."""
        return (self.python, path, *map(str, arguments))

    def benchmark(self, name: str, *arguments: str) -> tuple[str, ...]:
        """The command of a benchmark."""
        return self.script("benchmarks/run.py", name, *arguments, *(SMALL[name] if self.small else ()))


def first_flight(setup: Setup) -> list[Step]:
    """Whether everything runs, whether it is right, and how fast it is; 390 s if the extension is built already."""
    attention = setup.benchmark("attn", "--seconds", "22")
    decoder = setup.benchmark("decoder", "--dtypes", "bfloat16")
    return [
        *_preparation(setup),
        Step("smoke", setup.script("tests/flight/smoke.py"), 20, "each kernel once, and one captured training step"),
        _check(setup, 45),
        device_tests(setup, DEVICE_TESTS),
        _train_benchmark(setup, 75),
        Step("attn", attention, 40, "attention against its peers"),
        Step("decoder", decoder, 30, "six decoder layers against torch.compile"),
        Step("model", setup.benchmark("model"), 25, "inference of the whole model against its peers"),
        Step("small-kernels", _small_benchmarks(setup), 35, "the other kernels against their peers, in one process"),
        Step("training", _training(setup), 15, "a real run: bfloat16, CUDA graphs, workers, evaluation"),
        _pictures(setup),
    ]


def second_flight(setup: Setup) -> list[Step]:
    """Failed tests again, then further measurements, with the first flight's Triton cache; 240 s."""
    replays = setup.benchmark("attn", "--cudagraph", "--seconds", "18", "--grids", "r50", "--dtypes", "bfloat16")
    # The last option wins: two batch sizes, also with small sizes.
    replays = (*replays, "--batch", "1", "2")
    failed = _failed_tests(setup.failed) if setup.failed else DEVICE_TESTS
    sanitizers = setup.script("tests/sanitize.py", "--seconds", "25")
    return [
        *_preparation(setup),
        _check(setup, 30),
        *([replace(device_tests(setup, failed), seconds=30)] if failed else []),
        _train_benchmark(setup, 60),
        Step("attn-graphs", replays, 25, "attention of one and two images without the cost of launches"),
        Step("tune", setup.benchmark("tune", "--seconds", "8"), 25, "launch settings of the attention kernels"),
        Step(
            "data",
            setup.benchmark("data", "--shapes", "--rounds", "2"),
            15,
            "decoding and augmentation on the GPU against one core",
        ),
        _pictures(setup),
        Step("sanitizers", sanitizers, 30, "memcheck and racecheck over our kernels"),
    ]


def device_tests(setup: Setup, selection: tuple[str, ...]) -> Step:
    """A selection of tests, run in parallel if pytest-xdist is installed."""
    if setup.small:
        selection = SMALL_TESTS
    shared: tuple[str, ...] = ()
    if importlib.util.find_spec("xdist") or (setup.wheels and any(setup.wheels.glob("pytest_xdist-*"))):
        shared = ("-n", str(min(PROCESSES, os.cpu_count() or 1)))
    report = ("-v", "--tb=short", "--durations=20", "-o", "junit_family=xunit1")
    report = (*report, f"--junitxml={setup.work / 'junit.xml'}")
    words = (*shared, *report, *DEVICE_ONLY, *selection)
    command = (setup.python, "-m", "pytest", *words)
    # The processes share the cores: many threads in each would only wait for each other.
    command = ("env", "OMP_NUM_THREADS=1", *command) if shared else command
    return Step("tests", command, 80, "parity on the device")


def _preparation(setup: Setup) -> list[Step]:
    """Install the wheels, build the extension, describe the machine."""
    steps = []
    if setup.wheels:
        names = sorted({path.name.split("-")[0] for path in setup.wheels.glob("*.whl")})
        pip = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--find-links", str(setup.wheels))
        command = (setup.python, *pip, "--target", str(setup.work / "wheels"), *names)
        steps.append(Step("wheels", command, 10, "packages that this Python lacks"))
    if not setup.has_native:
        steps.append(Step("extension", setup.script("tests/flight/build.py"), 120, "CUDA kernels for this GPU only"))
    environment = setup.script("tests/flight/environment.py")
    return [*steps, Step("environment", environment, 15, "the machine, and the backends that run on it")]


def _check(setup: Setup, seconds: float) -> Step:
    """Checks the kernels, so that `auto` runs them from here on; in a rehearsal all count as proven."""
    check = (setup.python, "-m", "conddetr", "check", "--short", "--device", "cuda")
    command = setup.script("tests/proven.py") if setup.small else check
    return Step("check", command, seconds, "which kernels auto runs on this GPU")


def _train_benchmark(setup: Setup, seconds: float) -> Step:
    return Step("train", setup.benchmark("train", "--batch", "8"), seconds, "a training step against its peers")


def _small_benchmarks(setup: Setup) -> tuple[str, ...]:
    """All in one process, because each would spend most of its time importing PyTorch."""
    options = ("--seconds", "1", "--rounds", "1") if setup.small else ("--seconds", "3")
    return setup.script("benchmarks/run.py", *KERNELS, *options)


def _training(setup: Setup) -> tuple[str, ...]:
    options = {
        "preset": "conditional-detr-tiny",
        "backend": "auto",
        "precision": "bfloat16",
        "workers": "4",
        "epochs": "2",
        "eval-every": "1",
        "train-images": "32" if setup.small else "640",
        "val-images": "16" if setup.small else "100",
        "out": str(setup.work / "training"),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return (setup.python, "-m", "conddetr", "train", "--cuda-graphs", *words)


def _pictures(setup: Setup) -> Step:
    command = setup.script("benchmarks/run.py", "report", "--results", setup.work / "results")
    return Step("pictures", command, 10, "charts of the result files")


def _failed_tests(report: Path) -> tuple[str, ...]:
    """Node ids of the failed tests in a `junit.xml` of the family xunit1."""
    cases = ElementTree.parse(report).iter("testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    # A module that could not be collected has no file.
    return tuple(f"{case.get('file')}::{case.get('name')}" for case in failed if case.get("file"))
