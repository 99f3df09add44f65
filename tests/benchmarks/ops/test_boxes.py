"""The benchmark of the box losses times only correct answers."""

import torch

from ops import boxes


def test_smoke(benchmark, options, quick):
    problem = boxes.Problem(2, torch.float32)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert {"official-style", "torchvision, elementwise", "ours, eager"} <= set(result.seconds)
    # 84 matched boxes with their objects and 3600 assignments, read twice, and one gradient.
    assert result.work.bytes == 2 * (84 * 2 * 16 + 3600 * 8) + 3600 * 16
