"""The benchmark of the projected spatial query: only correct answers are timed, and work is counted."""

import torch

from ops import query


def test_smoke(benchmark, monkeypatch, options, quick):
    monkeypatch.setattr(query, "QUERIES", 7)
    problem = query.Problem(2, torch.float32)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert {"product, then F.linear", "torch.compile of it"} <= set(result.seconds)
    # λ, the result, its gradient, λ again, the gradient of λ; one product in forward, two in backward.
    assert result.work.bytes == 5 * 4 * 2 * 7 * 256
    assert result.work.flops == 3 * 2 * 14 * 256 * 256
