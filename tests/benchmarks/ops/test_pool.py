"""The benchmark of the pooling times right answers only."""

import argparse

import torch

from ops import pool


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(pool, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(pool, "HEIGHT", 8)
    problem, options = pool.Problem(2, torch.float32), argparse.Namespace(rounds=3, cudagraph=False)
    result = benchmark.pedantic(pool.run, (problem, options), rounds=1)
    assert {"PyTorch", "torch.compile of it"} <= set(result.seconds)
    # The map read and a quarter written.
    assert result.work.bytes == 2 * 64 * 8 * 533 * 5
