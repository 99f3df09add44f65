"""The comparison is fair, goes on where it stopped, and draws what is in its file."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import convergence
import pytest
import torch

import conddetr
from conddetr.engine.distributed import InterruptedRunError

PLAN = replace(convergence.PLANS["small"], train_images=16, val_images=2, epochs=2, eval_every=1)


def run(arm, lr, seed, losses, ap50=(), probe=False):
    curve = [{"step": 10 * (i + 1), "seconds": 1.0 + i, "loss": loss} for i, loss in enumerate(losses)]
    for point, value in zip(curve, ap50, strict=False):
        point.update(AP=value / 2, AP50=value)
    return {"arm": arm, "lr": lr, "seed": seed, "probe": probe, "curve": curve}


def test_both_families_have_the_same_loss_and_prior():
    models = [convergence.build(arm, 3, "eager") for arm in convergence.PAIR]
    assert models[0].config == models[1].config
    assert [type(model.transformer.decoder).__name__ for model in models] == ["ConditionalDecoder", "DETRDecoder"]
    for model in models:
        assert model.class_embed.weight.shape[0] == 3
        assert model.class_embed.bias.sigmoid().mean().item() == pytest.approx(0.01)
    images = torch.randn(2, 3, 64, 64)
    assert models[1](images)["pred_logits"].shape == (2, 25, 3)


def test_the_rate_of_a_family_is_that_of_the_least_loss():
    losses = dict(zip(PLAN.rates, (5, 4, 6), strict=True))
    best = PLAN.rates[1]
    runs = [run("DETR", lr, 0, [9, loss], probe=True) for lr, loss in losses.items()]
    assert convergence.chosen_rates(PLAN, runs) == {"detr-tiny": best}
    assert convergence.chosen_rates(PLAN, runs[:-1]) == {}
    todo = convergence.trainings(PLAN, {"detr-tiny": best})
    assert [(training.arm.name, training.lr, training.seed) for training in todo] == [
        ("DETR", best, seed) for seed in range(3)
    ]


def test_a_rate_that_fails_is_not_chosen():
    runs = [run("DETR", lr, 0, [9], probe=True) for lr in PLAN.rates[1:]]
    runs.append({"arm": "DETR", "lr": PLAN.rates[0], "seed": 0, "probe": True, "failed": "FloatingPointError: loss"})
    assert convergence.chosen_rates(PLAN, runs) == {"detr-tiny": PLAN.rates[1]}


def test_the_longest_training_begins_first():
    plan = replace(PLAN, arms=convergence.PAIR + convergence.ABLATIONS)
    todo = convergence.trainings(plan, {"detr-tiny": 1e-3, "conditional-detr-tiny": 1e-3})
    assert todo[0].epochs == 8 * plan.epochs
    assert [training.seed for training in todo[1:]] == sorted(training.seed for training in todo[1:])


def test_drawn_images_are_those_of_the_set(tmp_path):
    convergence.draw_images(PLAN, tmp_path)
    for drawn, shapes in zip(convergence.data_sets(PLAN, tmp_path), convergence.shapes_of(PLAN), strict=True):
        image, target = drawn[1]
        expected, expected_target = shapes[1]
        assert torch.equal(image, expected)
        assert torch.equal(target["boxes"], expected_target["boxes"])
        assert drawn.ground_truth() == shapes.ground_truth()
    train_set, _ = convergence.data_sets(PLAN, tmp_path)
    assert (train_set.draw(33)[0] == train_set.draw(1)[0]).all()


def test_a_training_is_kept_and_not_repeated(tmp_path):
    convergence.draw_images(PLAN, tmp_path)
    training = convergence.trainings(PLAN, {"detr-tiny": 7e-4})[0]
    found = convergence.train(PLAN, training, convergence.Folders(tmp_path, tmp_path / "kept"))
    assert [point["step"] for point in found["curve"]] == [2, 4]
    assert all(0 <= point["AP"] <= point["AP50"] <= 1 and point["seconds"] > 0 for point in found["curve"])
    detector = conddetr.Detector.from_checkpoint(tmp_path / "kept" / "detr-tiny.pt")
    assert detector.model.config.family == "detr"
    path = tmp_path / "runs.json"
    convergence.write(path, PLAN, [found, {**training.key, "seed": 1, "failed": "reason"}])
    assert convergence.read(path, PLAN) == [found]
    assert convergence.missing([training], convergence.read(path, PLAN)) == []
    for other in (replace(PLAN, epochs=3), replace(PLAN, rates=(1.0,))):
        with pytest.raises(SystemExit, match="another plan"):
            convergence.read(path, other)


def test_no_training_begins_after_the_deadline(tmp_path):
    folders = convergence.Folders(tmp_path, tmp_path)
    assert convergence.train(PLAN, convergence.probes(PLAN)[0], folders, deadline=0.0) is None


def test_one_failure_leaves_the_others(tmp_path, monkeypatch):
    def train(plan, training, folders, deadline):
        if training.lr == plan.rates[0]:
            raise FloatingPointError("the loss")
        return run(training.arm.name, training.lr, training.seed, [1], [0.5], probe=training.is_probe)

    monkeypatch.setattr(convergence, "train", train)
    runs, path = [], tmp_path / "runs.json"
    todo = convergence.probes(PLAN)
    with ThreadPoolExecutor(1) as pool:
        convergence._train_all(pool, convergence.Folders(tmp_path, tmp_path), path, PLAN, runs, 0.0, todo)
    assert len(runs) == 6
    assert sum("failed" in found for found in runs) == 2
    assert len(convergence.read(path, PLAN)) == 4


def test_an_interrupted_training_did_not_fail():
    future = Future()
    future.set_exception(InterruptedRunError("SIGTERM came"))
    with pytest.raises(InterruptedRunError):
        convergence.outcome(future, convergence.probes(PLAN)[0])


def test_steps_to_a_score():
    runs = [run("a", 1, 0, [3, 2, 1], [0.1, 0.5, 0.9]), run("a", 1, 1, [3, 2, 1], [0.1, 0.3, 0.9])]
    assert convergence.steps_to(runs, "AP50", 0.4) == 20
    assert convergence.steps_to(runs, "AP50", 0.95) is None


def test_picture_and_table(tmp_path):
    runs = [run(name, 1, seed, [3, 2], [0.1, 0.2 + seed]) for name in ("a", "b") for seed in (0, 0.5)]
    runs.append(run("a", 1, 0, [3], probe=True))
    assert convergence.draw(tmp_path / "some.json", runs).read_bytes().startswith(b"\x89PNG")
    columns = convergence.table(runs).columns
    assert list(columns[0].cells) == ["a", "b"]
    assert next(iter(columns[6].cells)) == "45.0 (20.0–70.0)"
