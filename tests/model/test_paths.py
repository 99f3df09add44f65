"""Implementations that ran, for each combination of backend and mode: a fast path must not silently be skipped."""

import pytest
import torch

import conddetr
from conddetr.kernels import native, paths

HAS_NATIVE = pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
HAS_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is without oneDNN")
SMALL = {"num_classes": 3, "num_queries": 7, "encoder_layers": 1, "decoder_layers": 2}
SDPA = "PyTorch's scaled_dot_product_attention"
SEPARABLE = "conditional_attention, separable spatial keys"
DENSE = "conditional_attention, dense spatial keys"


def record(preset, backend, train=False, fused=False):
    """Paths of one forward pass over two images of unequal size; in training also of losses and gradients."""
    model = conddetr.build(preset, backend=backend, **SMALL).train(train)
    model = model.fused() if fused else model
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}] * 2
    with torch.set_grad_enabled(train), conddetr.record_paths() as calls:
        output = model([torch.randn(3, 64, 96), torch.randn(3, 48, 64)])
        if train:
            conddetr.build_criterion(model)(output, targets)["loss"].backward()
    return calls


@pytest.mark.parametrize("train", [False, True])
def test_eager_is_plain_pytorch(train):
    calls = record("conditional-detr-r50", "eager", train)
    expected = {
        "backbone": {"modules": 1},
        "predicted_boxes": {"eager": 1},
        "self-attention": {SDPA: 3},
        "cross-attention": {DENSE: 2},
        "conditional_attention": {"eager": 2},
        "sine_embedding": {"eager": 1},
        "grid_positions": {"eager": 1},
    }
    if train:
        expected |= {"relu_dropout": {"eager": 3}, "dropout_add": {"eager": 8}, "linear_assignment": {"eager": 1}}
        expected |= {
            name: {"eager": 1} for name in ("matching_cost", "focal_loss", "matched_box_loss", "prediction_errors")
        }
    assert calls == expected
    assert calls.reasons == {}


@HAS_NATIVE
@HAS_ONEDNN
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_kernels_in_inference(backend):
    calls = record("conditional-detr-r50", backend)
    expected = {
        "backbone": {"norms folded in the graph": 17},
        "predicted_boxes": {"eager": 1},
        "convolution": {"native": 13, "oneDNN, fused": 40},
        "self-attention": {"conditional_attention": 3},
        "key projections": {"one product": 6},
        "cross-attention": {SEPARABLE: 2},
        "conditional_attention": {"native": 5},
        "sine_embedding": {"native": 1},
        "grid_positions": {"eager": 1},
    }
    assert calls == expected
    assert record("conditional-detr-r50", backend, fused=True) == {**expected, "backbone": {"frozen copy": 16}}
    if backend == "auto":
        assert calls.reasons["conditional_attention"].keys() == {"triton"}


@HAS_ONEDNN
def test_frozen_copy_of_eager_uses_pytorchs_fused_convolutions():
    calls = record("conditional-detr-r50", "eager", fused=True)
    assert calls["backbone"] == {"frozen copy": 16}
    assert calls["convolution"] == {"oneDNN, fused": 53}
    assert calls["conditional_attention"] == {"eager": 2}


@HAS_NATIVE
@HAS_ONEDNN
def test_kernels_in_training():
    calls = record("conditional-detr-r50", "auto", train=True)
    assert calls["backbone"] == {"norms folded in the graph": 17}
    # The stem and the first stage are frozen; our kernel runs the 13 convolutions of 3×3 without stride.
    assert calls["convolution"] == {"native": 13, "oneDNN, fused": 8, "gradient of weights by products": 32}
    assert calls["self-attention"] == {"conditional_attention": 3}
    assert calls["conditional_attention"] == {"native": 5}
    assert (calls["relu_dropout"], calls["dropout_add"]) == ({"native": 3}, {"native": 8})
    assert calls["linear_assignment"] == {"native": 1}
    for name in ("matching_cost", "focal_loss", "matched_box_loss", "prediction_errors"):
        assert calls[name] == {"eager": 1}
        assert calls.reasons[name].keys() == {"triton"}


def test_triton_under_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    calls = record("conditional-detr-tiny", "triton", train=True)
    for name in ("conditional_attention", "sine_embedding", "matching_cost", "focal_loss", "matched_box_loss"):
        assert set(calls[name]) == {"triton"}, name
    assert calls["self-attention"] == {SDPA: 3}


def test_mask_of_any_shape_makes_keys_dense():
    model = conddetr.build("conditional-detr-tiny", backend="auto", **SMALL).eval()
    with torch.no_grad(), conddetr.record_paths() as calls:
        model(torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    assert calls["cross-attention"] == {DENSE: 2}


def test_compiled_code_records_nothing_and_has_no_graph_break():
    model = conddetr.build("conditional-detr-tiny", backend="auto", **SMALL).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad(), conddetr.record_paths() as calls:
        compiled(image)
    assert calls == {}
    assert "torch.compile records nothing" in str(calls)
    with torch.no_grad(), conddetr.record_paths() as outer:
        with conddetr.record_paths() as inner:
            model(image)
        model(image)
    assert outer["backbone"]["modules"] == 2 * inner["backbone"]["modules"] == 2
    assert paths._recorders == []
    with torch.no_grad():
        model(image)
    assert outer["backbone"]["modules"] == 2


def test_table_lists_refused_backends_with_reasons():
    with conddetr.record_paths() as calls:
        conddetr.kernels.sine_embedding(torch.rand(2, 2, dtype=torch.float64), 8)
    lines = str(calls).splitlines()
    assert lines[0].split("  ")[0].strip() == "operation or part"
    assert "sine_embedding" in lines[1]
    assert "eager" in lines[1]
    assert "triton: its kernels take float32" in lines[1]
