"""The host side of GPU code, tested in another process with GPUs that do nothing (tests/null_gpu)."""

import os
import subprocess
import sys
from pathlib import Path

import null_gpu
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(null_gpu.why_not() is not None, reason=str(null_gpu.why_not())),
    pytest.mark.skipif(null_gpu.IS_RUNNING, reason="this process has null GPUs itself"),
]


def run_tests(*selection, devices=1, python=sys.executable):
    """Run tests on null GPUs; at least one must run, and all must pass."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *selection]
    launcher = [python, "tests/null_gpu", "--devices", str(devices)]
    run = subprocess.run([*launcher, *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout.splitlines()[-1]


def test_fast_tests_pass_on_two_null_gpus():
    run_tests("tests/null_gpu", devices=2)


@pytest.mark.slow
def test_slow_tests_pass_on_two_null_gpus():
    run_tests("tests/null_gpu", "-m", "slow", devices=2)


@pytest.mark.slow
def test_host_side_of_all_device_tests():
    # Without the tests of single hooks, which do the same work on the host.
    run_tests("tests", "-m", "gpu", "-k", "not test_hooks_fire")


@pytest.mark.slow
def test_command_line_and_detector():
    """Both use a GPU by default. Export runs on the CPU; its device tests run above."""
    run_tests("tests/test_cli.py", "tests/test_detector.py")


@pytest.mark.slow
@pytest.mark.parametrize("selection", [("tests/null_gpu",), ("tests", "-m", "gpu")], ids=["on two", "device tests"])
def test_oldest_pytorch(selection):
    """With another Python's PyTorch and Triton kernels compile, and the host side works."""
    python = os.environ.get("CONDDETR_OLDEST_PYTHON")
    if not python:
        pytest.skip("CONDDETR_OLDEST_PYTHON is not set: it names a Python with PyTorch 2.11 and this package")
    run_tests(*selection, devices=2, python=python)
