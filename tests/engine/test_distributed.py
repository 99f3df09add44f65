"""Several processes, or several batches per step, equal one large batch; a signal to one rank stops all ranks."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from small_runs import (
    LIMIT,
    assert_same_run,
    counter,
    finish,
    free_port,
    run_to_the_end,
    start_ranks,
    steps_of_a_resnet,
    stop_in_evaluation,
    wait_for_steps,
)

from conddetr.engine.checkpoint import read_checkpoint


@pytest.mark.parametrize(("family", "splits"), [("conditional-detr", [(2, 1), (1, 2)]), ("detr", [(2, 2)])])
def test_two_processes_and_two_batches_equal_one_large_batch(tmp_path, family, splits):
    splits = [(1, 1), *splits]
    for ranks, batches in splits:
        finish(*start_ranks(ranks, steps_of_a_resnet, tmp_path / f"{ranks}{batches}", family, batches))
    whole, *results = [torch.load(tmp_path / f"{ranks}{batches}") for ranks, batches in splits]
    largest = max(gradient.abs().max() for gradient in whole["gradients"].values())
    assert largest > 0.1
    for result in results:
        assert result["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, atol=1e-5 * float(largest), rtol=1e-5)


def test_signal_to_one_rank_stops_all_ranks_and_loses_nothing(tmp_path):
    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
    options = {"images": 96, "epochs": 2, "model_options": {"dropout": 0.1}, "ema_decay": 0.9, "eval_every": 2}
    finish(*start_ranks(2, run_to_the_end, tmp_path / "whole", options, counter()))
    steps = counter()
    ranks = start_ranks(2, run_to_the_end, tmp_path / "cut", options, steps)
    wait_for_steps(ranks[1], steps, 5)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for process in ranks:
        process.join(LIMIT)
        assert process.exitcode == 143
    position = read_checkpoint(tmp_path / "cut" / "checkpoint.pt")["position"]
    assert 0 < position["step"] < 24
    finish(*start_ranks(2, run_to_the_end, tmp_path / "cut", options, counter()))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_agents_of_several_machines_form_one_run(tmp_path):
    """The command of docs/training.md, with two agents on this machine; either may get rank 0."""
    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "x"]
    agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    run = ["-m", "conddetr", "train", "--device", "cpu", "--epochs", "1", "--batch-size", "4", "--workers", "0"]
    run += ["--train-images", "8", "--val-images", "2", "--out", str(tmp_path)]
    agents = [subprocess.Popen([*agent, *run], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = sorted((process.communicate(timeout=LIMIT)[0] for process in agents), key=len)
    assert [process.returncode for process in agents] == [0, 0]
    assert "epoch" not in printed[0]
    assert "8 training and 2 validation images; 2 processes" in printed[1]
    position = read_checkpoint(tmp_path / "checkpoint.pt")["position"]
    assert (position["epoch"], position["step"]) == (1, 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_signal_during_evaluation_stops_all_ranks_after_the_batch(tmp_path, ranks):
    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
    # Four images to evaluate, so every rank has at least two batches.
    options = {"images": 4, "epochs": 2, "batch_size": 1}
    cut = start_ranks(ranks, stop_in_evaluation, tmp_path / "cut", options)
    for process in cut:
        process.join(LIMIT)
        assert process.exitcode == 143
    position = read_checkpoint(tmp_path / "cut" / "checkpoint.pt")["position"]
    assert position == {"epoch": 0, "batch": 4 // ranks, "step": 4 // ranks}
    for folder in ("cut", "whole"):
        finish(*start_ranks(ranks, run_to_the_end, tmp_path / folder, options, counter()))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
