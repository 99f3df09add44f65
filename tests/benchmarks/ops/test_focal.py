"""The benchmark of the focal loss times right answers only, and counts their bytes."""

import argparse

import torch

from ops import focal


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(focal, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    problem, options = focal.Problem(1, torch.float32), argparse.Namespace(rounds=3, cudagraph=False)
    result = benchmark.pedantic(focal.run, (problem, options), rounds=1)
    assert {"torchvision", "torch.compile of it", "ours, eager"} <= set(result.seconds)
    assert result.work.bytes == 3 * 4 * 6 * 300 * 91
