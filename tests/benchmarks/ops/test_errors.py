"""The benchmark of the errors of predictions times right answers only, and counts their bytes."""

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
    # 91 logits and an object, of each of 3600 predictions.
    assert result.work.bytes == 3600 * (91 * 4 + 8)
    exact = problem.exact(problem.make())
    # At least four of seven are right, and nearly every prediction is of an object.
    assert 30 < exact["class"] <= 100 * 3 / 7 + 1e-6
    assert exact["cardinality"].min() > 270


def _off(function):
    """One prediction of 600 too many."""
    return lambda *inputs: (function(*inputs)[0], function(*inputs)[1] + 0.5)
