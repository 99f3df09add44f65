"""The benchmark of the box losses times right answers only."""

import argparse

import torch

from ops import boxes


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(boxes, "copy_bandwidth", lambda: 1e9)
    problem, options = boxes.Problem(2, torch.float32), argparse.Namespace(rounds=3, cudagraph=False)
    result = benchmark.pedantic(boxes.run, (problem, options), rounds=1)
    assert {"official-style", "torchvision, elementwise", "ours, eager"} <= set(result.seconds)
    # Twice 84 matched boxes with their objects and 3600 assignments, and one gradient.
    assert result.work.bytes == 2 * (84 * 2 * 16 + 3600 * 8) + 3600 * 16
