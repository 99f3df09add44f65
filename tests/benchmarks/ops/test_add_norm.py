"""The benchmark of residual add and norm: only correct answers are timed, and bytes are counted."""

import torch

from ops import add_norm


def test_smoke(benchmark, options, quick):
    problem = add_norm.Problem(2, 50, torch.bfloat16)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert {"eager", "torch.compile of it"} <= set(result.seconds)
    # Inputs of 2 and 4 bytes, read twice; outputs of 4, 2 and 2 bytes and their gradients; gradients of the inputs.
    assert result.work.bytes == (2 * 6 + 2 * 8 + 6) * 2 * 50 * 256
