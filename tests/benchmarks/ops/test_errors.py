"""The benchmark of prediction errors times only correct answers, and counts their bytes."""

import pytest
import torch

from ops import errors


@pytest.mark.parametrize("is_right", [True, False])
def test_smoke(is_right, benchmark, monkeypatch, options, quick):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function if is_right else _off(function))
    problem = errors.Problem(2, torch.float32)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert "PyTorch" in result.seconds
    assert ("torch.compile of it" in result.seconds) == is_right
    # 91 logits and one object for each of 3600 predictions.
    assert result.work.bytes == 3600 * (91 * 4 + 8)
    exact = problem.exact(problem.make())
    # At least four of seven classes are right, and nearly every prediction is an object.
    assert 30 < exact["class"] <= 100 * 3 / 7 + 1e-6
    assert exact["cardinality"].min() > 270


def _off(function):
    """The function with a cardinality error of half a prediction too much."""
    return lambda *inputs: (function(*inputs)[0], function(*inputs)[1] + 0.5)
