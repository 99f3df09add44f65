"""The benchmark of max pooling times only correct answers."""

import torch

from ops import pool


def test_smoke(benchmark, monkeypatch, options, quick):
    monkeypatch.setattr(pool, "HEIGHT", 8)
    problem = pool.Problem(2, torch.float32)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert {"PyTorch", "torch.compile of it"} <= set(result.seconds)
    # The map is read, and a quarter of it written.
    assert result.work.bytes == 2 * 64 * 8 * 533 * 5
