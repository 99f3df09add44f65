"""The benchmark of dropout's bits times right answers only."""

import argparse

import torch

from ops import bits


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(bits, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(bits, "QUERIES", 20)
    problem, options = bits.Problem(1, "25×34"), argparse.Namespace(rounds=3, cudagraph=False)
    result = benchmark.pedantic(bits.run, (problem, options), rounds=1)
    assert {"PyTorch", "torch.compile of it"} <= set(result.seconds)
    # 850 keys are 14 tiles of two words.
    assert result.work.bytes == 4 * 8 * 28 * 20
