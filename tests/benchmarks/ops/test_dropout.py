"""The benchmark of dropout: all implementations are checked and timed, and bytes are counted right."""

import pytest
import torch

from conddetr.kernels import native
from ops import dropout


@pytest.mark.slow
@pytest.mark.parametrize("operation", list(dropout.WIDTHS))
def test_run(operation, benchmark, options, known_rates):
    problem = dropout.Problem(operation, 50, torch.float32)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    if dropout.DEVICE.type == "cuda":
        ours = ["ours, triton"] if operation == "relu_dropout" else []
    else:
        ours = [] if native.NOT_LOADED else ["ours, native"]
    assert list(result.seconds) == ["eager", "torch.compile of it", *ours]
    # Two inputs and an output or an input and two outputs, and two of three in backward.
    assert result.work.bytes == 5 * 50 * dropout.WIDTHS[operation] * 4
