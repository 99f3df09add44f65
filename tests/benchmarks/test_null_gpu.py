"""On a null GPU benchmarks run to the end and write no figures."""

import re
import subprocess
import sys
from pathlib import Path

import null_gpu
import pytest

from harness import show, store

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(null_gpu.why_not() is not None, reason=str(null_gpu.why_not())),
]


def run(command: str) -> str:
    """Output of a benchmark, which must succeed."""
    words = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *command.split(), "--seconds", "1"]
    result = subprocess.run(words, capture_output=True, text=True, env=null_gpu.environment(), cwd=ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_benchmark_runs_to_the_end_without_figures():
    """A flight's rehearsal (`tests/test_flight.py`) runs the others."""
    before = sorted(store.RESULTS.iterdir())
    output = run("sine --cudagraph --points 2400")
    assert "wrote no result file: null GPU" in output
    assert "ours, triton" in output
    assert "at capture" in output
    assert not re.search(r"\bms\b|GB/s|TFLOP|× floor", output)
    assert sorted(store.RESULTS.iterdir()) == before


def test_compiled_peers_run_or_are_refused_with_a_reason():
    output = run("attn --grids r50 --batch 2 --dtypes bfloat16 --dropout 0 --no-backward")
    timed, refused = output.split(show.NOT_COMPARED)[:2]
    for name in ("torch.compile of it", "FlexAttention", "varlen_attn, flash, padded values"):
        assert f"│ {name} " in timed
    assert "FlexAttention, FLASH: " in refused or "│ FlexAttention, FLASH " in timed
