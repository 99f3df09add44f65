"""Training: it learns, writes what it should, resumes, and names a bad batch."""

import json

import pytest
import torch

import conddetr
from conddetr.data.synthetic import SyntheticShapes
from conddetr.engine.checkpoint import read_checkpoint
from conddetr.engine.trainer import TrainConfig, Trainer, make_optimizer

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")

CPU = torch.device("cpu")
FAST = {"batch_size": 4, "workers": 0, "lr": 1e-3, "lr_backbone": 1e-3}


def trainer(tmp_path, images=16, model_options=None, **options):
    torch.manual_seed(0)
    model = conddetr.build("conditional-detr-tiny", num_classes=3, **(model_options or {}))
    config = TrainConfig(**{**FAST, "epochs": 2, **options})
    return Trainer(model, SyntheticShapes(images, 1), SyntheticShapes(4, 2), config, tmp_path, CPU)


def test_loss_falls_and_files_are_complete(tmp_path):
    metrics = trainer(tmp_path, images=96, epochs=4, eval_every=4).fit()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert "AP" not in records[0]
    assert records[-1]["AP50"] == metrics["AP50"]
    assert len(metrics) == 12
    content = read_checkpoint(tmp_path / "checkpoint.pt")
    assert content["epoch"] == 3
    assert content["config"]["num_classes"] == 3
    assert [c["name"] for c in content["classes"]] == ["disk", "square", "triangle"]


def test_two_runs_are_equal(tmp_path):
    for name in ("a", "b"):
        trainer(tmp_path / name).fit()
    first, second = (read_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_continues_where_it_stopped(tmp_path):
    trainer(tmp_path / "whole", epochs=3).fit()
    trainer(tmp_path / "cut", epochs=1).fit()
    second = trainer(tmp_path / "cut", epochs=3)
    second.resume(tmp_path / "cut" / "checkpoint.pt")
    second.fit()
    first, second = (read_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 3


def test_an_earlier_run_is_not_overwritten(tmp_path):
    trainer(tmp_path, epochs=1).fit()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match=r"checkpoint\.pt is from an earlier run: resume it"):
        trainer(tmp_path, epochs=1).fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_missing_metrics_are_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install pycocotools"):
        trainer(tmp_path).fit()
    assert not list(tmp_path.iterdir())


def test_weights_alone_are_not_resumed(tmp_path):
    torch.save({"model": {}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt can not be resumed: it has no 'optimizer'"):
        trainer(tmp_path).resume(tmp_path / "weights.pt")


def test_learning_rates_and_their_drop(tmp_path):
    run = trainer(tmp_path, epochs=3, lr_drop=2, lr_backbone=1e-4)
    rates = []
    step = run._step

    def spy(*batch):
        rates.append(tuple(group["lr"] for group in run.optimizer.param_groups))
        return step(*batch)

    run._step = spy
    run.fit()
    assert rates[0] == rates[7] == (1e-3, 1e-4)
    assert rates[8] == rates[11] == pytest.approx((1e-4, 1e-5))


def test_every_trainable_parameter_is_optimised_once():
    model = conddetr.build("conditional-detr-r50", hidden_dim=32, encoder_layers=1, decoder_layers=1)
    groups = make_optimizer(model, TrainConfig()).param_groups
    counted = [id(p) for group in groups for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["lr"] for group in groups] == [1e-4, 1e-5]
    backbone = sum(p.numel() for p in groups[1]["params"])
    assert backbone == 23232512


def test_gradients_are_clipped(tmp_path):
    run = trainer(tmp_path, epochs=1, clip_max_norm=0.05)
    run.fit()
    norm = torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()
    assert norm == pytest.approx(0.05, rel=1e-3)


def test_time_limit_stops_and_still_evaluates(tmp_path):
    metrics = trainer(tmp_path, images=4000, epochs=50, time_limit=0.5).fit()
    assert len(metrics) == 12
    assert read_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 0


def test_loss_that_is_not_finite_names_the_images(tmp_path):
    run = trainer(tmp_path)
    with torch.no_grad():
        run.model.bbox_embed.layers[-1].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="decoder layer 0, image 0 of the batch"):
        run.fit()
    run = trainer(tmp_path)
    run.criterion.weights["loss_ce"] = float("inf")
    with pytest.raises(FloatingPointError, match=r"not finite: \['loss'\] on image ids \[\d+, \d+, \d+, \d+\]"):
        run.fit()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_wrong_class_count_and_too_large_batch_are_named(tmp_path):
    model = conddetr.build("conditional-detr-tiny")
    with pytest.raises(ValueError, match="the data set has 3 classes, the model was built for 91"):
        Trainer(model, SyntheticShapes(4, 1), SyntheticShapes(4, 2), TrainConfig(), tmp_path, CPU)
    with pytest.raises(ValueError, match="batch_size: 100 is more than the 16 training images"):
        trainer(tmp_path, batch_size=100).fit()
