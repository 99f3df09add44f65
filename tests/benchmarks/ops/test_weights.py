"""The benchmark of a step's weights: right answers only are timed, and bytes are counted right."""

import argparse

import torch

from ops import weights


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(weights, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    problem, options = (
        weights.Problem("conditional-detr-tiny", torch.bfloat16),
        argparse.Namespace(rounds=3, cudagraph=False),
    )
    result = benchmark.pedantic(weights.run, (problem, options), rounds=1)
    assert {"eager", "torch.compile of it"} <= set(result.seconds)
    numbers = sum(part.numel() for part in weights.parts_of(problem.make()))
    # Four bytes of a parameter and two of a weight, in both directions.
    assert result.work.bytes == 2 * (4 + 2) * numbers > 1e6
