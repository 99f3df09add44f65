"""The benchmark of the projected spatial query: right answers only are timed, and work is counted right."""

import argparse

import torch

from ops import query


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(query, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(query, "product_rate", lambda dtype: 1e12)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(query, "QUERIES", 7)
    problem, options = query.Problem(2, torch.float32), argparse.Namespace(rounds=3, cudagraph=False)
    result = benchmark.pedantic(query.run, (problem, options), rounds=1)
    assert {"product, then F.linear", "torch.compile of it"} <= set(result.seconds)
    # λ, the result, its gradient, λ again, the gradient of λ; a product forward, two backward.
    assert result.work.bytes == 5 * 4 * 2 * 7 * 256
    assert result.work.flops == 3 * 2 * 14 * 256 * 256
