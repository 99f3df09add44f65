"""A run that is killed anywhere and resumed ends bitwise as an uninterrupted run."""

import random
import signal

import pytest
from small_runs import assert_same_run, counter, finish, run_to_the_end, start, wait_for_steps

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")

OPTIONS = {
    "images": 24,
    "model_options": {"dropout": 0.1},
    "epochs": 2,
    "accumulate": 2,
    "ema_decay": 0.9,
    "schedule": "cosine",
    "warmup_steps": 3,
}
OFTEN, RARELY = {"save_every_steps": 1}, {"save_every_steps": 4}
VARIANTS = [OFTEN, RARELY, OFTEN, RARELY, OFTEN, {**RARELY, "workers": 1}]
"""Options for saving and loading, used in turn; the result is the same. Workers start slowly, so few runs use them."""
STEPS = 6


@pytest.mark.parametrize(("count", "seed"), [(3, 0), pytest.param(17, 1, marks=pytest.mark.slow)])
def test_run_killed_at_random_points_ends_like_the_whole_run(tmp_path, count, seed):
    steps = counter()
    finish(start(run_to_the_end, tmp_path / "whole", OPTIONS, steps))
    assert steps.value == STEPS
    chance = random.Random(seed)
    kills, run = [], 0
    while len(kills) < count:
        # Each run is killed repeatedly until it ends before it can be killed.
        folder, steps, target = tmp_path / str(run), counter(), chance.randint(0, STEPS)
        process = start(run_to_the_end, folder, {**OPTIONS, **VARIANTS[len(kills) % len(VARIANTS)]}, steps)
        wait_for_steps(process, steps, target)
        # Kill it between steps, in the next step, while a checkpoint is written, or in the epoch's evaluation.
        process.join(chance.uniform(0.0, 0.2))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills.append(steps.value)
        else:
            assert process.exitcode == 0
            assert_same_run(folder, tmp_path / "whole")
            run += 1
    finish(start(run_to_the_end, tmp_path / str(run), {**OPTIONS, **VARIANTS[0]}, counter()))
    assert_same_run(tmp_path / str(run), tmp_path / "whole")
    assert sum(done > 0 for done in kills) >= count / 2
