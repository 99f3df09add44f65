"""What every benchmark shares: checked results, interleaved timing, the environment, and a result file."""

import json
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
console = Console()


def measure(runs: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every call; on a CPU all implementations in turn within each round, so that drift hits all alike.

    Args:
        runs: implementation → what to time.
        rounds: timed calls of each, on a CPU; a GPU is timed for a fixed while.
        warmup: calls of each before that.
    """
    if torch.cuda.is_available():
        return {name: _device_seconds(run) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(warmup + rounds), description="measuring", console=console, transient=True):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                samples[name].append(time.perf_counter() - start)
    return samples


def _device_seconds(run: Callable[[], object]) -> list[float]:
    """On a GPU: between device events, the L2 cache cleared before each call."""
    from triton.testing import do_bench

    return [1e-3 * milliseconds for milliseconds in do_bench(run, return_mode="all")]


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def environment() -> dict[str, str]:
    """What a reader needs to know to repeat a measurement."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "device": device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
    }


def write_result(name: str, settings: dict, results: dict) -> Path:
    """Raw samples, with settings and environment, as `results/<device>/<name>.json`."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"environment": environment(), "settings": settings, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def print_table(title: str, samples: dict[str, list[float]], baseline: str) -> None:
    """Median, spread (10th to 90th percentile) and speed-up over the baseline."""
    table = Table(title=title)
    for column in ("implementation", "median ms", "10–90 % ms", "speed-up"):
        table.add_column(column, justify="left" if column == "implementation" else "right")
    base = median(samples[baseline])
    for name, values in samples.items():
        low, high = torch.tensor(values).quantile(torch.tensor([0.1, 0.9])).tolist()
        middle = median(values)
        table.add_row(name, f"{1e3 * middle:.1f}", f"{1e3 * low:.1f}–{1e3 * high:.1f}", f"{base / middle:.2f}×")
    console.print(table)
