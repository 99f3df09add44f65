"""The benchmark of ReLU and dropout: all implementations are checked and timed, and bytes are counted."""

import pytest
import torch

from conddetr.kernels import native
from ops import relu_dropout


@pytest.mark.slow
def test_run(benchmark, options, known_rates):
    result = benchmark.pedantic(relu_dropout.Problem(50, torch.float32).measured, (options,), rounds=1)
    backend = "triton" if torch.cuda.is_available() else "native"
    ours = [] if backend == "native" and native.NOT_LOADED else [f"ours, {backend}"]
    assert list(result.seconds) == ["eager", "torch.compile of it", *ours]
    # Input and output; in backward the output again and two gradients.
    assert result.work.bytes == 5 * 50 * 2048 * 4
