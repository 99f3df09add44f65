"""On a null GPU every benchmark for GPUs goes through to its end, and leaves no figure behind."""

import re
import subprocess
import sys
from pathlib import Path

import harness
import null_gpu
import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "attn.py --grids r50 --batch 2 --dtypes bfloat16 --dropout 0.1 --backward",
    "attn.py --cudagraph --grids r50 --batch 1 2 --dtypes bfloat16",
    "boxes.py --images 2",
    "cost.py --images 2",
    "decoder.py --batch 2 --dtypes bfloat16",
    "focal.py --images 2",
    "match.py --images 2 --objects 7",
    "model.py --size 320 416",
    "sine.py --points 2400",
    "sine.py --cudagraph --points 2400",
    "train.py --size 320 416 --batch 2",
    "tune.py --kernels forward",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(null_gpu.why_not() is not None, reason=str(null_gpu.why_not())),
]


def run(command: str, **variables: str) -> str:
    """What a benchmark prints; it must end well."""
    program, *options = command.split()
    words = [sys.executable, str(ROOT / "benchmarks" / program), *options, "--seconds", "1"]
    environment = {**null_gpu.environment(), **variables}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_goes_through_to_its_end(command):
    before = sorted(harness.RESULTS.iterdir())
    # Compiling by inductor is no step of the benchmark, and takes most of the time.
    said = run(command, TORCH_COMPILE_DISABLE="1")
    assert "wrote no result file: null GPU" in said
    assert "ours, triton" in said or "settings go through" in said
    assert not re.search(r"\bms\b|GB/s|TFLOP|× floor", said)
    assert ("at capture" in said) == ("--cudagraph" in command or command.startswith("train"))
    assert sorted(harness.RESULTS.iterdir()) == before


def test_compiled_peers_go_through_or_say_why_not():
    said = run("attn.py --grids r50 --batch 2 --dtypes bfloat16 --dropout 0 --no-backward")
    went_through, refused = said.split(harness.NOT_COMPARED)[:2]
    for name in ("torch.compile of it", "FlexAttention", "varlen_attn, flash, padded values"):
        assert f"│ {name} " in went_through
    assert "FlexAttention, FLASH: " in refused or "│ FlexAttention, FLASH " in went_through
