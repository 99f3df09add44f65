"""The benchmark of dropout before a residual add: all implementations are checked and timed, and bytes are counted."""

import pytest
import torch

from conddetr.kernels import native
from ops import dropout


@pytest.mark.slow
def test_run(benchmark, options, known_rates):
    result = benchmark.pedantic(dropout.Problem(50, torch.float32).measured, (options,), rounds=1)
    ours = [] if torch.cuda.is_available() or native.NOT_LOADED else ["ours, native"]
    assert list(result.seconds) == ["eager", "torch.compile of it", *ours]
    # Two inputs and an output, and two gradients in backward.
    assert result.work.bytes == 5 * 50 * 256 * 4
