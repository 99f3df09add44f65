"""The benchmark of predicted boxes times only correct answers."""

import torch

from ops import prediction


def test_smoke(benchmark, options, quick):
    problem = prediction.Problem(2, torch.float32)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert {"PyTorch", "torch.compile of it"} <= set(result.seconds)
    # 3600 boxes, five times.
    assert result.work.bytes == 5 * 3600 * 16
