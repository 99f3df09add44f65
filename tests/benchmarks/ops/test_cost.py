"""The benchmark of the matching cost times only correct answers."""

import torch

from ops import cost


def test_smoke(benchmark, options, quick):
    problem = cost.Problem(2, torch.float32)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert {"official-style", "ours, eager"} <= set(result.seconds)
    pairs, coordinates = 6 * 2 * 300 * 7, 4 * 2 * (6 * 300 + 7)
    assert result.work.bytes == 4 * (2 * pairs + coordinates)


def test_cost_of_an_image_ignores_other_images():
    inputs = cost.Problem(3, torch.float32).make()
    alone = [
        cost.official(
            cost.Inputs(
                *(x[:, i : i + 1] for x in (inputs.logits, inputs.boxes)),
                *(x[i : i + 1] for x in (inputs.labels, inputs.objects)),
            )
        )
        for i in range(3)
    ]
    torch.testing.assert_close(cost.official(inputs), torch.cat(alone, dim=1))
