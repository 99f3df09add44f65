"""The benchmark of the predicted boxes times right answers only."""

import argparse

import torch

from ops import prediction


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(prediction, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    problem, options = prediction.Problem(2, torch.float32), argparse.Namespace(rounds=3, cudagraph=False)
    result = benchmark.pedantic(prediction.run, (problem, options), rounds=1)
    assert {"PyTorch", "torch.compile of it"} <= set(result.seconds)
    # Five times 3600 boxes.
    assert result.work.bytes == 5 * 3600 * 16
