"""The comparison is fair, goes on where it stopped, and draws what is in its file."""

from dataclasses import replace

import convergence
import pytest
import torch

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
    losses = dict(zip(convergence.RATES, (5, 4, 6, 7, 8), strict=True))
    best = convergence.RATES[1]
    runs = [run("DETR", lr, 0, [9, loss], probe=True) for lr, loss in losses.items()]
    assert convergence.chosen_rates(PLAN, runs) == {"detr-tiny": best}
    assert convergence.chosen_rates(PLAN, runs[:-1]) == {}
    todo = convergence.trainings(PLAN, {"detr-tiny": best})
    assert [(training.arm.name, training.lr, training.seed) for training in todo] == [
        ("DETR", best, seed) for seed in range(3)
    ]


def test_a_training_is_kept_and_not_repeated(tmp_path):
    training = convergence.trainings(PLAN, {"conditional-detr-tiny": 7e-4})[0]
    found = convergence.train(PLAN, training)
    assert [point["step"] for point in found["curve"]] == [2, 4]
    assert all(0 <= point["AP"] <= point["AP50"] <= 1 and point["seconds"] > 0 for point in found["curve"])
    path = tmp_path / "runs.json"
    convergence.write(path, PLAN, [found])
    assert convergence.read(path, PLAN) == [found]
    assert convergence.missing([training], convergence.read(path, PLAN)) == []
    with pytest.raises(SystemExit, match="another plan"):
        convergence.read(path, replace(PLAN, epochs=3))


def test_no_training_begins_after_the_deadline():
    assert convergence.train(PLAN, convergence.probes(PLAN)[0], deadline=0.0) is None


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
