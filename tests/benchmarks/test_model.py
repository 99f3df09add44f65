"""The benchmark of inference times equal outputs only."""

import argparse

import model
import pytest
import torch

import conddetr


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = argparse.Namespace(rounds=3, cudagraph=False, compiled=False, size=(64, 96))
    result = benchmark.pedantic(model.run, ("tiny", "conditional-detr-tiny", options), rounds=1)
    assert {"official-style eager", "ours, eager"} <= set(result.seconds)
    assert "resnet50 or resnet101, which timm has" in result.refused["HuggingFace"]


def test_a_wrong_answer_is_not_timed():
    right = {"pred_logits": torch.randn(1, 9, 4), "pred_boxes": torch.rand(1, 9, 4)}
    assert model.check(right, right) == {"pred_logits": 0.0, "pred_boxes": 0.0}
    with pytest.raises(SystemExit, match="pred_boxes differs by"):
        model.check(right, {**right, "pred_boxes": right["pred_boxes"] + 2e-5})
    alike = {name: value[:, :1].expand_as(value) for name, value in right.items()}
    with pytest.raises(SystemExit, match="the check says nothing"):
        model.check(alike, alike)


def test_the_official_form_is_not_folded():
    reference = conddetr.build("conditional-detr-r50", encoder_layers=1, decoder_layers=1, num_queries=5).eval()
    runs, _ = model.our_runs(reference, torch.randn(1, 3, 64, 64), compiled=False)
    with torch.inference_mode():
        outputs = {name: function()["pred_logits"] for name, function in runs.items() if "triton" not in name}
    assert runs["official-style eager"].func.backbone[0]._kept is None
    assert reference.backbone[0]._kept is not None
    for found in outputs.values():
        torch.testing.assert_close(found, outputs["official-style eager"], atol=1e-4, rtol=0)
