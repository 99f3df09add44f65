"""Whole commands on a GPU: training with evaluation, resuming, evaluation, prediction; two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conddetr.cli import main
from conddetr.kernels import native
from null_gpu.counts import counted

SMALL = ["--train-images", "24", "--val-images", "4", "--batch-size", "4", "--epochs", "2", "--backend", "auto"]
WITH_GRAPHS = ["--precision", "bfloat16", "--preflight"]


@pytest.fixture
def train(tmp_path):
    """A function that runs `conddetr train` on a GPU and returns the entries of its log, one per epoch."""
    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")

    def run(*options):
        assert main(["train", "--out", str(tmp_path), "--device", "cuda", *SMALL, *options]) == 0
        return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    return run


def needed_waits(epochs, steps, evaluated, graphs):
    """What the host waits for in a training, and how often; it waits for nothing else."""
    return {
        "the previous step's report": steps,
        "before, while and after a graph is recorded": 3 * graphs,
        "a checkpoint's copy, in the thread that writes it": epochs + 1,
        "the previous batch's detections": evaluated,
    }


@pytest.mark.parametrize(
    "options",
    [pytest.param(["--no-cuda-graphs"], marks=pytest.mark.slow, id="plain"), pytest.param(WITH_GRAPHS, id="graphs")],
)
def test_training_with_workers_evaluates_and_resumes(train, options, tmp_path, capsys):
    with counted() as counts:
        first = train("--workers", "2", *options)
    said = capsys.readouterr().out
    has_graphs = "--no-cuda-graphs" not in options
    assert ("preflight: 4 images of" in said) == ("--preflight" in options)
    assert ("CUDA graphs: batches come in 1 shape, each is recorded" in said) == has_graphs
    assert counts.refused_in_capture == 0
    # Six steps per epoch.
    assert counts.graph_launches == 12 * has_graphs
    assert counts.waits == sum(needed_waits(epochs=2, steps=12, evaluated=1, graphs=has_graphs).values())
    assert {"AP", "AP50", "gpu_memory_gib"} <= set(first[-1])
    second = train("--epochs", "3", "--resume", "auto", *options)
    assert second[-1]["epoch"] == first[-1]["epoch"] + 1
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((80, 120, 3), np.uint8)).save(image)
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint.pt"), "--device", "cuda"]
    assert main(["eval", *checkpoint]) == 0
    with counted() as counts:
        assert main(["predict", str(image), "--out", str(tmp_path / "drawn"), "--threshold", "0", *checkpoint]) == 0
        assert main(["attention", str(image), "--out", str(tmp_path / "drawn"), *checkpoint]) == 0
    assert counts.launches > 0
    assert list((tmp_path / "drawn").glob("*.png"))


def test_machine_is_described(capsys):
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert f"({torch.cuda.get_device_name()})" in said
    if native.NOT_LOADED is None and native.build_info()["cuda"] is not None:
        assert "on this GPU: sm_90a" in said


@pytest.mark.slow
def test_each_process_trains_on_a_separate_gpu():
    """In two processes, with gradients summed by NCCL."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "null_gpu.two_processes"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-m", *launcher], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = sorted(line.split()[1:] for line in run.stdout.splitlines() if line.startswith("counted"))
    launches = [(int(number), int(first) > 0, int(second) > 0, int(sums) >= 3) for number, first, second, sums in rows]
    assert launches == [(0, True, False, True), (1, False, True, True)]
