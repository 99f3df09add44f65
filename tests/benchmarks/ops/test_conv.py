"""The benchmark of convolutions: all implementations are checked and timed, and operations are counted."""

import pytest

from ops import conv


@pytest.fixture
def run(quick, benchmark, options):
    """Runs a problem and returns its result."""
    return lambda problem: benchmark.pedantic(problem.measured, (options,), rounds=1)


def names():
    on_gpu = conv.DEVICE.type == "cuda"
    middle = ["ours, eager", "ours, triton"] if on_gpu else ["ours, eager"]
    return ["PyTorch", *["torch.compile of it"] * on_gpu, *middle, "ours, auto"]


@pytest.mark.parametrize("backward", [False, True])
def test_single_convolution(backward, run):
    result = run(conv.Problem("1×1, out, residual", 2, (30, 45), backward))
    assert list(result.seconds) == names()
    # 2 images of 8 × 12 cells, 64 to 256 channels; each of both gradients needs the same number.
    cells, passes = 2 * 8 * 12, 3 if backward else 1
    assert result.work.flops == passes * 2 * cells * 64 * 256
    # x, weight, bias, residual, and the result.
    assert result.work.bytes == passes * 4 * (cells * 64 + 64 * 256 + 256 + 2 * cells * 256)


def test_pair(run):
    result = run(conv.Problem("pair, 1×1 and 3×3, strided", 2, (30, 45), backward=True))
    assert list(result.seconds) == names()
    # 2 images of 8 × 12 cells, 256 to 128 channels, then of 4 × 6 cells with nine products each.
    cells, cells_out = 2 * 8 * 12, 2 * 4 * 6
    assert result.work.flops == 3 * 2 * (cells * 256 * 128 + cells_out * 9 * 128 * 128)
    # x, both weights and biases, and the result; the map between them is not counted.
    assert result.work.bytes == 3 * 4 * (cells * 256 + 256 * 128 + 9 * 128 * 128 + 2 * 128 + cells_out * 128)
