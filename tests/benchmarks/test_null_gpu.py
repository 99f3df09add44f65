"""On a null GPU benchmarks go through to their end, and leave no figure behind."""

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
    """What a benchmark prints; it must end well."""
    words = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *command.split(), "--seconds", "1"]
    done = subprocess.run(words, capture_output=True, text=True, env=null_gpu.environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_benchmark_goes_through_to_its_end_and_leaves_no_figure():
    """A flight's rehearsal (`tests/test_flight.py`) runs the others."""
    before = sorted(store.RESULTS.iterdir())
    said = run("sine --cudagraph --points 2400")
    assert "wrote no result file: null GPU" in said
    assert "ours, triton" in said
    assert "at capture" in said
    assert not re.search(r"\bms\b|GB/s|TFLOP|× floor", said)
    assert sorted(store.RESULTS.iterdir()) == before


def test_compiled_peers_go_through_or_say_why_not():
    said = run("attn --grids r50 --batch 2 --dtypes bfloat16 --dropout 0 --no-backward")
    went_through, refused = said.split(show.NOT_COMPARED)[:2]
    for name in ("torch.compile of it", "FlexAttention", "varlen_attn, flash, padded values"):
        assert f"│ {name} " in went_through
    assert "FlexAttention, FLASH: " in refused or "│ FlexAttention, FLASH " in went_through
