"""Runs a few kernel tests under compute-sanitizer and prints one line per tool; exits with status 1 on a finding.

    python tests/sanitize.py [--seconds 40]

A missing tool, or a GPU that the tool does not support, is not a finding: the line says so.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from flight.processes import run_whole

ROOT = Path(__file__).parent.parent
# Not initcheck: it skips PyTorch's kernels, and reports the memory that they wrote as uninitialised.
TOOLS = ("memcheck", "racecheck")
TESTS = (
    "tests/kernels/test_attn.py",
    "tests/kernels/test_cuda.py",
    "tests/kernels/test_sine.py",
    "tests/kernels/test_focal.py",
    "tests/kernels/test_boxes.py",
    "tests/kernels/test_cost.py",
    "tests/kernels/test_match.py",
    "-k",
    "dense_keys or strided or clamped or shape1-20 or small_losses or 7-dtype0 or no_class or layers_share",
)
FINDING = 86
"""Exit status of compute-sanitizer on a finding; pytest has none this high."""


def verdict(status: int, output: str) -> tuple[bool, str]:
    """Whether a run is acceptable, and the text to print.

    Args:
        status: exit status of compute-sanitizer.
        output: its output and that of the tests.
    """
    # Before the status: on an unsupported device, every later call fails.
    if "Device not supported" in output:
        return True, "not checked: the tool does not support this device"
    if status == FINDING:
        findings = [line for line in output.splitlines() if line.startswith("=========")]
        return False, "\n".join(["findings:", *findings[:40]])
    summary = re.search(r"=+ (.*SUMMARY: .*)", output)
    if status == 0 and summary:
        return True, summary[1]
    return False, f"failed with status {status}:\n" + "\n".join(output.splitlines()[-40:])


def kernels() -> set[str]:
    """Names of all kernels of this repository, Triton's and those in CUDA C++."""
    names = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        names.update(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    for path in (ROOT / "csrc").rglob("*.cuh"):
        names.update(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", path.read_text()))
    return names


def check(program: str, seconds: float, tool: str) -> tuple[bool, str]:
    """Run the tests under one tool; at the time limit, kill it with everything that it started."""
    # Checks kernels whose mangled name contains one of these. With PyTorch's kernels it would take minutes.
    filters = [word for name in sorted(kernels()) for word in ("--kernel-name", f"kns={name}")]
    command = [program, "--tool", tool, "--error-exitcode", str(FINDING), *filters]
    # Without PyTorch's caching allocator every tensor is a separate allocation, whose bounds are checked.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        ended = run_whole([*command, sys.executable, "-m", "pytest", "-q", *TESTS], seconds, output, environment, ROOT)
        if ended.status is None:
            return True, f"not finished in {seconds:.0f} s: these kernels are not checked (--seconds raises the limit)"
        return verdict(ended.status, output.read_text(errors="replace"))


def main() -> None:
    """Run both tools."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40, help="for each tool; default 40")
    options = parser.parse_args()
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if program is None:
        print("compute-sanitizer: not checked: it is neither on the PATH nor in CUDA_HOME/bin (CUDA contains it)")
        return
    # In parallel: most of the work is the host's, and nothing is timed.
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(partial(check, program, options.seconds), TOOLS))
    for tool, (_, text) in zip(TOOLS, results, strict=True):
        print(f"{tool}: {text}", flush=True)
    if not all(is_fine for is_fine, _ in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
