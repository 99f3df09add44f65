"""compute-sanitizer over a few kernel tests, one line per tool; exit status 1 on a finding.

    python tests/sanitize.py [--seconds 40]

A machine whose GPU the tool refuses, or without the tool, is no finding: the line says so.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck")
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
"""Exit status that compute-sanitizer is told to give on a finding; pytest has none so high."""


def verdict(status: int, output: str) -> tuple[bool, str]:
    """Whether a run is no reason to stop, and what to say of it.

    Args:
        status: exit status of compute-sanitizer.
        output: all that it and the tests wrote.
    """
    # Before the status: on a device that it refuses, every call fails afterwards.
    if "Device not supported" in output:
        return True, "not checked: the tool says that it does not support this device"
    if status == FINDING:
        found = [line for line in output.splitlines() if line.startswith("=========")]
        return False, "\n".join(["found:", *found[:40]])
    summary = re.search(r"=+ (.*SUMMARY: .*)", output)
    if status == 0 and summary:
        return True, summary[1]
    return False, f"failed with status {status}:\n" + "\n".join(output.splitlines()[-40:])


def check(program: str, tool: str, seconds: float) -> tuple[bool, str]:
    """One tool over the tests."""
    command = [program, "--tool", tool, "--error-exitcode", str(FINDING), sys.executable, "-m", "pytest", "-q", *TESTS]
    # Without torch's cache every tensor is an allocation of its own, whose bounds are checked.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    root = Path(__file__).parent.parent
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=root)
    except subprocess.TimeoutExpired:
        return True, f"not finished in {seconds:.0f} s (--seconds gives more); nothing is said of these kernels"
    return verdict(run.returncode, run.stdout + run.stderr)


def main() -> None:
    """Run every tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40, help="for each tool; default 40")
    options = parser.parse_args()
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if program is None:
        print("compute-sanitizer: not checked: it is not on the PATH nor in CUDA_HOME/bin (it comes with CUDA)")
        return
    results = {}
    for tool in TOOLS:
        results[tool], text = check(program, tool, options.seconds)
        print(f"{tool}: {text}", flush=True)
    if not all(results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
