"""transformers' DAB-DETR, accelerated, compared with itself before."""

import pytest
import torch
import torch.nn.functional as F

import conddetr
from conddetr.kernels import native, registry

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")

from small_huggingface import run, small_batch, small_dab
from transformers.models.dab_detr import modeling_dab_detr as modeling

from conddetr.interop.huggingface import attention, dab_detr


@pytest.fixture
def float64(monkeypatch):
    """transformers fixes float32 for the initial queries and for the softmax of all attention."""
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_outputs_losses_and_gradients_stay(backend, training, float64):
    if backend == "native" and native.NOT_LOADED is not None:
        pytest.skip(native.NOT_LOADED)
    model = small_dab(auxiliary_loss=training).train(training)
    before = run(model, small_batch(float64))
    assert before["logits"].std(1).mean() > 0.02, "with equal queries this test proves nothing"
    conddetr.accelerate(model, backend)
    after = run(model, small_batch(float64))
    assert after.keys() == before.keys()
    for name, expected in before.items():
        torch.testing.assert_close(after[name], expected, rtol=1e-9, atol=1e-9, msg=name)
    assert not torch.equal(after["logits"], before["logits"]), "nothing was replaced"


def test_outputs_and_losses_stay_in_float32():
    model = small_dab(auxiliary_loss=True, attention_dropout=0.3)
    before = run(model, small_batch())
    conddetr.accelerate(model)
    after = run(model, small_batch())
    for name in ("logits", "boxes", "loss"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5, msg=name)


def test_report_lists_the_code_that_runs(monkeypatch):
    model = small_dab()
    report = conddetr.accelerate(model, "eager")
    assert [(part.name, part.count) for part in report.replaced] == [
        ("encoder self-attention", 1), ("cross-attention", 3), ("matcher and loss", 1),
    ]  # fmt: skip
    assert {part.name for part in report.left} == {"decoder self-attention", "sine embedding", "backbone"}
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(dab_detr.CrossAttention) == kinds.count(modeling.DabDetrAttention) == 3

    calls = []

    def record(*args, **options):
        calls.append(options["dropout_p"])
        return conditional_attention(*args, **options)

    conditional_attention = attention.conditional_attention
    monkeypatch.setattr(attention, "conditional_attention", record)
    with torch.no_grad():
        model(**small_batch())
        assert len(calls) == 3
        monkeypatch.setattr(registry, "why_not", lambda *_, **__: "not built")
        report = conddetr.accelerate(model)
        model(**small_batch())
    assert len(calls) == 3, "without a kernel, transformers' own attention runs"
    assert "transformers' own runs" in {part.name: part.note for part in report.left}["cross-attention"]


def test_attention_maps_come_from_transformers():
    model = small_dab()
    with torch.no_grad():
        before = model(**small_batch(), output_attentions=True)
        conddetr.accelerate(model)
        after = model(**small_batch(), output_attentions=True)
    for name in ("cross_attentions", "decoder_attentions", "encoder_attentions"):
        assert len(after[name]) == len(before[name]) > 0
        assert all(torch.equal(a, b) for a, b in zip(after[name], before[name], strict=True)), name


@pytest.mark.parametrize("train", [False, True])
def test_norms_of_timms_resnet_are_folded(train):
    pytest.importorskip("timm", reason="timm is not installed (pip install -e .[test])")
    model = small_dab(use_timm_backbone=True, backbone="resnet18", backbone_config=None).train(train)
    before = run(model, small_batch())
    report = conddetr.accelerate(model)
    assert "backbone" in [part.name for part in report.replaced]
    with conddetr.record_paths() as paths:
        after = run(model, small_batch())
    assert paths["backbone"] == {"norms folded in the graph": 9}
    largest = max(value.abs().max().item() for name, value in before.items() if name.startswith("gradient"))
    for name, expected in before.items():
        tolerance = 1e-5 * largest if name.startswith("gradient") else 1e-4
        torch.testing.assert_close(after[name], expected, rtol=1e-3, atol=tolerance, msg=name)
