"""The benchmark of the sine embedding times only correct answers, and counts their bytes."""

from functools import partial

import pytest
import torch

from harness.check import usable
from ops import sine

SMALL = [sine.Problem(name, 50, torch.float32, True) for name in ("sine_embedding", "conditional_spatial_query")]


@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.operation)
def test_smoke(problem, benchmark, options, quick):
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert {len(samples) for samples in result.seconds.values()} == {3}
    assert all("cannot run here" in reason for reason in result.refused.values())
    assert {"eager", "torch.compile of it"} <= set(result.seconds)


def test_bytes(known_rates):
    """One point in float32: 256 channels written and λ read; in backward both gradients, and λ again."""

    def size(operation, backward):
        return sine.Problem(operation, 1, torch.float32, backward).work().bytes

    assert size("sine_embedding", False) == 4 * (256 + 2)
    assert size("conditional_spatial_query", False) == 4 * (2 * 256 + 2)
    assert size("sine_embedding", True) == 4 * (2 * 256 + 3 * 2)
    assert size("conditional_spatial_query", True) == 4 * (5 * 256 + 3 * 2)


def test_wrong_gradient_is_not_timed():
    tensors = SMALL[1].make()
    right = partial(SMALL[1].compute, partial(sine.embed, backend="eager"), tensors)

    def wrong():
        outputs = right()
        return {**outputs, "points": 1.01 * outputs["points"]}

    _, refused = usable({"eager": right, "ours": wrong}, lambda call: call(), right(), is_random=False)
    assert refused["ours"].startswith("wrong answer: error of points ")
