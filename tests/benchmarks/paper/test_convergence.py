"""The comparison is fair, resumes after an interruption, and reports what is in its file."""

import json
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import conddetr
from conddetr.interrupt import InterruptedRunError
from harness import store
from paper import convergence, convergence_report

PLAN = replace(convergence.PLANS["small"], train_images=16, val_images=2, epochs=2, eval_every=1)


def run(arm, lr, seed, losses, ap50=()):
    curve = [{"step": 10 * (i + 1), "seconds": 1.0 + i, "loss": loss} for i, loss in enumerate(losses)]
    for point, value in zip(curve, ap50, strict=False):
        point.update(AP=value / 2, AP50=value)
    return {"arm": arm, "lr": lr, "seed": seed, "curve": curve}


def test_both_families_have_the_same_loss_and_prior():
    models = [convergence.build(arm, 3, "eager") for arm in convergence.PAIR]
    assert models[0].config == models[1].config
    assert [type(model.transformer.decoder).__name__ for model in models] == ["ConditionalDecoder", "DETRDecoder"]
    for model in models:
        assert model.class_embed.weight.shape[0] == 3
        assert model.class_embed.bias.sigmoid().mean().item() == pytest.approx(0.01)
    images = torch.randn(2, 3, 64, 64)
    assert models[1](images)["pred_logits"].shape == (2, 25, 3)


def test_rate_of_a_family_is_that_of_its_best_first_training():
    scores = dict(zip(PLAN.rates, (0.2, 0.4, 0.1), strict=True))
    best = PLAN.rates[1]
    runs = [run("DETR", lr, 0, [9, 8], [0.5, score]) for lr, score in scores.items()]
    assert convergence.chosen_rates(PLAN, runs) == {"detr-tiny": best}
    assert convergence.chosen_rates(PLAN, runs[:-1]) == {}
    todo = convergence.trainings(PLAN, {"detr-tiny": best})
    assert [(training.arm.name, training.lr, training.seed) for training in todo] == [
        ("DETR", best, seed) for seed in range(3)
    ]


def test_failed_rate_is_not_chosen():
    runs = [run("DETR", lr, 0, [9], [0.0]) for lr in PLAN.rates[1:]]
    runs.append({"arm": "DETR", "lr": PLAN.rates[0], "seed": 0, "failed": "FloatingPointError: loss"})
    assert convergence.chosen_rates(PLAN, runs) == {"detr-tiny": PLAN.rates[1]}


def test_longest_training_starts_first():
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


def test_training_is_saved_and_not_repeated(tmp_path):
    convergence.draw_images(PLAN, tmp_path)
    training = convergence.trainings(PLAN, {"detr-tiny": 7e-4})[0]
    result = convergence.train(PLAN, training, convergence.Folders(tmp_path, tmp_path / "kept"))
    assert [point["step"] for point in result["curve"]] == [2, 4]
    assert all(0 <= point["AP"] <= point["AP50"] <= 1 and point["seconds"] > 0 for point in result["curve"])
    detector = conddetr.Detector.from_checkpoint(tmp_path / "kept" / "detr-tiny-0.0007.pt")
    assert detector.model.config.family == "detr"
    path = tmp_path / "runs.json"
    convergence.write(path, PLAN, [result, {**training.key, "seed": 1, "failed": "reason"}])
    assert convergence.read(path, PLAN) == [result]
    assert convergence.missing([training], convergence.read(path, PLAN)) == []
    for other in (replace(PLAN, epochs=3), replace(PLAN, rates=(1.0,))):
        with pytest.raises(SystemExit, match="another plan"):
            convergence.read(path, other)


def test_no_training_starts_after_the_deadline(tmp_path):
    folders = convergence.Folders(tmp_path, tmp_path)
    assert convergence.train(PLAN, convergence.first_trainings(PLAN)[0], folders, deadline=0.0) is None


def test_failure_does_not_stop_the_other_trainings(tmp_path, monkeypatch):
    def train(plan, training, folders, deadline):
        if training.lr == plan.rates[0]:
            raise FloatingPointError("the loss")
        return run(training.arm.name, training.lr, training.seed, [1], [0.5])

    monkeypatch.setattr(convergence, "train", train)
    runs, path = [], tmp_path / "runs.json"
    todo = convergence.first_trainings(PLAN)
    with ThreadPoolExecutor(1) as pool:
        convergence._train_all(pool, convergence.Folders(tmp_path, tmp_path), path, PLAN, runs, 0.0, todo)
    assert len(runs) == 6
    assert sum("failed" in entry for entry in runs) == 2
    assert len(convergence.read(path, PLAN)) == 4


def test_interrupted_training_is_not_a_failure():
    future = Future()
    future.set_exception(InterruptedRunError("SIGTERM came"))
    with pytest.raises(InterruptedRunError):
        convergence.outcome(future, convergence.first_trainings(PLAN)[0])


def test_steps_to_a_score():
    runs = [run("a", 1, 0, [3, 2, 1], [0.1, 0.5, 0.9]), run("a", 1, 1, [3, 2, 1], [0.1, 0.3, 0.9])]
    assert convergence_report.steps_to(runs, "AP50", 0.4) == 20
    assert convergence_report.steps_to(runs, "AP50", 0.95) is None


def test_ratios_of_steps():
    fast = [run("Conditional DETR", 1, 0, [3, 2, 1], [0.1, 0.6, 0.9])]
    arms = {"Conditional DETR": fast, "DETR": [run("DETR", 1, 0, [3, 2, 1], [0.1, 0.2, 0.5])]}
    same, most = convergence_report.ratios(arms)
    assert "AP50 50.0" in same
    assert same.endswith("after 20 steps, DETR after 30: 1.5 times as many.")
    assert most.endswith("after 30 steps, DETR not in 30: more than 1.0 times as many.")
    arms["DETR, 8 times as long"] = [run("DETR, 8 times as long", 1, 0, [3] * 8, [0.1] * 7 + [0.95])]
    assert convergence_report.ratios(arms)[1].endswith("as long after 80: 2.7 times as many.")
    arms["DETR, 8 times as long"][0]["curve"][-1]["AP50"] = 0.05
    assert "at least" in convergence_report.ratios(arms)[0]


def test_page_has_chosen_rates_and_order():
    environment = {"device": "some", "torch": "2", "commit": "abc"}
    runs = [run("DETR", lr, 0, [9], [score]) for lr, score in zip(PLAN.rates, (0.1, 0.15, 0.2), strict=True)]
    runs = [{**entry, "environment": environment} for entry in runs]
    scores = {"Conditional DETR": 0.4, "CSQ-C": 0.6}
    runs += [{**run(name, 1, 0, [3], [score]), "environment": environment} for name, score in scores.items()]
    runs.append({"arm": "CSQ-T", "lr": 1, "seed": 0, "failed": "OSError: disk"})
    page = convergence_report.markdown({"plan": convergence.asdict(PLAN), "runs": runs}, "some.png")
    assert "| DETR | 10.0 | 15.0 | 20.0 | 0.0015, at the edge" in page
    index = page.index
    assert index("| CSQ-C | 30.0 | 37.1 | 2 |") < index("| Conditional DETR | 20.0 | 40.9 | 1 |")
    assert "- failed: CSQ-T, 1, seed 0: OSError: disk" in page


@pytest.mark.parametrize("path", sorted((store.RESULTS / "paper").glob("convergence-*.json")), ids=lambda p: p.stem)
def test_committed_page_matches_the_committed_runs(path):
    page = convergence_report.markdown(json.loads(path.read_text()), f"{path.stem}.png")
    assert path.with_suffix(".md").read_text() == f"# {path.stem}\n\n{page}\n"


@pytest.fixture
def sigterm_restored():
    """Restores the handler that `main` sets for its process: later tests fork this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_main_trains_reports_and_resumes(tmp_path, monkeypatch, capsys, sigterm_restored):
    plan = replace(PLAN, epochs=1, rates=(7e-4,), arms=tuple(replace(arm, seeds=1) for arm in convergence.PAIR))
    monkeypatch.setattr(convergence, "PLANS", {"small": plan})
    monkeypatch.setattr(convergence, "RESULTS", tmp_path)
    monkeypatch.setattr(convergence, "KEPT", tmp_path / "kept")
    docs = tmp_path / "paper.md"
    begin, end = convergence_report.markers("convergence-small")
    docs.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    words = ["--small", "--docs", str(docs)]
    convergence.main(words)
    results = tmp_path / "paper" / "convergence-small.json"
    first = results.read_text()
    assert len(json.loads(first)["runs"]) == 2
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| Conditional DETR | 0.0007 | 1 | 2 |" in docs.read_text()
    assert "old" not in docs.read_text()
    # Nothing is missing: no training starts.
    monkeypatch.setattr(convergence, "ProcessPoolExecutor", None)
    convergence.main(words)
    assert results.read_text() == first
    # Published results, perhaps of another machine, are not resumed.
    (tmp_path / "kept" / "small.json").unlink()
    with pytest.raises(TypeError):
        convergence.main(words)


def test_chart_and_table(tmp_path):
    runs = [run(name, 1, seed, [3, 2], [0.1, 0.2 + seed]) for name in ("a", "b") for seed in (0, 0.5)]
    runs.append(run("a", 2, 0, [3, 3], [0.0, 0.1]))
    assert convergence_report.draw(tmp_path / "some.json", runs).read_bytes().startswith(b"\x89PNG")
    columns = convergence_report.table(runs).columns
    assert list(columns[0].cells) == ["a", "b"]
    assert next(iter(columns[6].cells)) == "45.0 (20.0–70.0)"
