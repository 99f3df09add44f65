"""The benchmark of 3×3 convolutions: all implementations are checked and timed, and operations are counted."""

import pytest

from conddetr.kernels import native
from ops import conv3x3


@pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
@pytest.mark.parametrize("backward", [False, True])
def test_run(backward, benchmark, options, known_rates):
    problem = conv3x3.Problem(64, 2, (30, 45), backward)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert list(result.seconds) == ["PyTorch, channels-last", "PyTorch, contiguous", "ours, native"]
    # 2 images of 8 × 12 cells, 64 × 64 channels, 9 products each; each of both gradients needs the same number.
    assert result.work.flops == 2 * (2 * 8 * 12) * 64 * 64 * 9 * (3 if backward else 1)
    assert result.work.bytes == 4 * (2 * (2 * 8 * 12 * 64) + 64 * 64 * 9) * (3 if backward else 1)
