"""The check before a run under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("is_writable", [True, False])
def test_one_process_checks_and_all_choose_the_same(tmp_path, is_writable):
    cache = tmp_path / "cache"
    if not is_writable:
        cache.touch()
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "null_gpu.two_checks"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "CONDDETR_CACHE": str(cache)}
    command = [sys.executable, "-m", *launcher, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("short check on ") == 1
    assert run.stderr.count("cannot be written to") == (not is_writable)
    first, second = ((tmp_path / f"rank-{number}").read_text() for number in range(2))
    assert first == second
    assert first.startswith("True ")
    assert "attention: PyTorch (" in first
    assert len(list(cache.glob("checked/*.json"))) == is_writable
