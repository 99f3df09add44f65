"""The benchmark of the predicted boxes times right answers only."""

import torch

from ops import prediction


def test_smoke(benchmark, options, quick):
    problem = prediction.Problem(2, torch.float32)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert {"PyTorch", "torch.compile of it"} <= set(result.seconds)
    # Five times 3600 boxes.
    assert result.work.bytes == 5 * 3600 * 16
