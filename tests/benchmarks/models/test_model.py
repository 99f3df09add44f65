"""The benchmark of inference times only models with equal outputs."""

import argparse

import pytest
import tf32
import torch

import conddetr
from conddetr.kernels.conv import pytorch as conv
from harness.machine import without_tf32
from harness.refusals import RefusedError
from models import model

SMALL = {"encoder_layers": 1, "decoder_layers": 1}


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = argparse.Namespace(rounds=3, cudagraph=False)
    problem = model.Problem("conditional-detr-tiny", (64, 96), compiled=False, images=2)
    result = benchmark.pedantic(problem.measured, (options,), rounds=1)
    assert "2×3×64×96" in result.title
    assert result.images == 2
    assert {"official-style eager", "ours", "ours, frozen copy", "ours, eager"} <= set(result.seconds)
    assert "resnet101, which timm has" in result.refused["HuggingFace"]


def test_every_number_of_images_is_a_problem():
    parser = argparse.ArgumentParser()
    model.Problem.arguments(parser)
    problems = model.Problem.asked_for(parser.parse_args(["--images", "1", "16"]))
    assert [problem.images for problem in problems] == [1, 16]
    assert len({problem.title for problem in problems}) == 2
    with pytest.raises(RefusedError, match="--images: expected at least 1, got 0"):
        model.Problem.asked_for(parser.parse_args(["--images", "0"]))


def test_wrong_answer_is_not_timed():
    right = {"pred_logits": torch.randn(1, 9, 4), "pred_boxes": torch.rand(1, 9, 4)}
    wrong = {**right, "pred_boxes": right["pred_boxes"] + 2e-5}
    refused = {}
    runs = {"official": lambda: right, "ours": lambda: wrong, "peer": lambda: 1 / 0, "same": lambda: right}
    assert list(model.alike(runs, refused)) == ["official", "same"]
    assert refused["ours"].startswith("wrong answer: pred_boxes differs by 2.0")
    assert refused["peer"] == "ZeroDivisionError: division by zero"
    collapsed = {name: value[:, :1].expand_as(value) for name, value in right.items()}
    with pytest.raises(RefusedError, match="the check would prove nothing"):
        model.alike({"official": lambda: collapsed}, refused)


def test_official_style_is_not_folded():
    reference = conddetr.build("conditional-detr-r50", backend="eager", **SMALL, num_queries=5).eval()
    runs, _ = model.our_runs(reference, torch.randn(1, 3, 64, 64), compiled=False)
    with torch.inference_mode():
        outputs = {name: function()["pred_logits"] for name, function in runs.items() if "triton" not in name}
    assert runs["official-style eager"].func is reference
    assert runs["ours"].func.backend == runs["ours, frozen copy"].func.backend == "auto"
    assert runs["ours"].func.fusion is None
    assert len(runs["ours, eager"].func.fusion.fused) == 17
    for logits in outputs.values():
        torch.testing.assert_close(logits, outputs["official-style eager"], atol=1e-4, rtol=0)


def test_outputs_are_compared_without_tf32(monkeypatch):
    """With PyTorch's default TF32 switch, folded batch norms would be refused as wrong."""
    tf32.plant(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    # As on a GPU, where we have no convolution kernel.
    monkeypatch.setattr(conv, "is_plain", lambda tensors: False)
    reference = conddetr.build("conditional-detr-r50", backend="eager", **SMALL, num_queries=20).eval()
    model.spread_outputs(reference)
    runs, _ = model.our_runs(reference, torch.randn(1, 3, 64, 96), compiled=False)
    runs = {name: runs[name] for name in ("official-style eager", "ours, eager")}
    refused = {}
    with torch.inference_mode():
        model.alike(runs, refused)
        assert refused["ours, eager"].startswith("wrong answer: pred_logits differs by")
        with without_tf32():
            assert model.alike(runs, {}) == runs
