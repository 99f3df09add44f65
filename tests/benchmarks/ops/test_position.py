"""The benchmark of positions times only correct answers, and counts their bytes."""

import pytest
import torch

from ops import position


@pytest.mark.parametrize("is_right", [True, False])
def test_smoke(is_right, benchmark, monkeypatch, options, quick):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function if is_right else _swapped(function))
    problem = position.Problem(3, torch.float32)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert "PyTorch" in result.seconds
    assert ("torch.compile of it" in result.seconds) == is_right
    # 256 numbers and the padding flag for each cell of three images.
    assert result.work.bytes == 3 * 25 * 34 * (256 * 4 + 1)


def _swapped(function):
    """x before y, which is wrong."""

    def swapped(*inputs):
        position, *others = function(*inputs)
        return position.roll(128, -1), *others

    return swapped
