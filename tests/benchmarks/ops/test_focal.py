"""The benchmark of the focal loss times only correct answers, and counts their bytes."""

import torch

from ops import focal


def test_smoke(benchmark, options, quick):
    problem = focal.Problem(1, torch.float32)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert {"torchvision", "torch.compile of it", "ours, eager"} <= set(result.seconds)
    assert result.work.bytes == 3 * 4 * 6 * 300 * 91
