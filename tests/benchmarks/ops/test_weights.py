"""The benchmark of a step's weights: only correct answers are timed, and bytes are counted."""

import torch

from ops import weights


def test_smoke(benchmark, options, quick):
    problem = weights.Problem("conditional-detr-tiny", torch.bfloat16)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert {"eager", "torch.compile of it"} <= set(result.seconds)
    numbers = sum(part.numel() for part in weights.parts_of(problem.make()))
    # Four bytes per parameter and two per weight, in both directions.
    assert result.work.bytes == 2 * (4 + 2) * numbers > 1e6
