"""Accelerated models on fused operations: same numbers as transformers' modules, which run if a part is not plain."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")

from small_huggingface import run, small_batch, small_config, small_model
from transformers import ConditionalDetrForObjectDetection
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

import conddetr
from conddetr.kernels import registry
from conddetr.model.fast import layers as fast_layers

if not hasattr(modeling, "ConditionalDetrDecoderCrossAttention"):
    pytest.skip("before transformers 5 the layers are called as modules", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.compares_numbers.with_args(ValueError),
    pytest.mark.skipif(
        registry.why_not("triton", torch.device(DEVICE), torch.float32) is not None,
        reason="Triton runs neither on this device nor in its interpreter",
    ),
]
FUSED = {"encoder": {"fused operations"}, "decoder": {"fused operations"}}


def model_of(**options):
    options = {"encoder_layers": 2, "decoder_layers": 2, "num_queries": 5, **options}
    model = small_model(**options)
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias, 0.0, 0.2)
    return model.to(DEVICE)


def accelerate(model):
    """Fused operations on any device; on a CPU, attention and loss, which have separate tests, are eager to be fast."""
    report = conddetr.accelerate(model, "triton")
    if DEVICE == "cpu":
        for layer in model.model.decoder.layers:
            layer.encoder_attn.backend = "eager"
        model._loss_function = partial(model._loss_function.func, backend="eager")
    return report


def forward(model, autocast=False, **options):
    """Outputs without a loss."""
    inputs = {name: value.to(DEVICE) for name, value in small_batch().items() if name != "labels"}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        return model(**inputs, **options)


def paths_of(model, **options):
    """The paths that computed encoder and decoder."""
    with torch.no_grad(), conddetr.record_paths() as counts:
        forward(model, **options)
    return {name: set(counts[name]) for name in FUSED}


def assert_same(values, expected, tolerance=1e-4):
    """Compare values by name, each relative to its largest."""
    assert list(values) == list(expected)
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1).item()
        label = f"{name}: {{}}".format
        torch.testing.assert_close(values[name], value, atol=tolerance * scale, rtol=0, msg=label)


@pytest.mark.parametrize("auxiliary_loss", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_numbers_are_equal_to_those_of_transformers(training, auxiliary_loss):
    model = model_of(auxiliary_loss=auxiliary_loss).train(training)
    expected = run(model, small_batch())
    accelerate(model)
    assert paths_of(model) == FUSED
    assert_same(run(model, small_batch()), expected)


@pytest.mark.parametrize("family", ["autocast", "half model"])
def test_half_precision_has_the_accuracy_and_dtypes_of_transformers(family):
    options = {"auxiliary_loss": True}
    model = model_of(**options)
    inputs = {name: value.to(DEVICE) for name, value in small_batch(torch.float64).items() if name != "labels"}
    exact = copy.deepcopy(model).double()(**inputs)
    if family == "half model":
        model.bfloat16()
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    else:
        inputs["pixel_values"] = inputs["pixel_values"].float()
    names = ("last_hidden_state", "encoder_last_hidden_state", "logits", "pred_boxes")
    errors, dtypes = [], []
    for accelerates in (False, True):
        if accelerates:
            accelerate(model)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=family == "autocast"):
            out = model(**inputs)
        dtypes.append({name: getattr(out, name).dtype for name in names})
        errors.append([(getattr(out, name).double() - getattr(exact, name)).norm().item() for name in names])
    # On a CPU autocast leaves layer norms in half precision; the null GPU runs this test for GPUs.
    if DEVICE == "cuda" or family == "half model":
        assert dtypes[1] == dtypes[0]
    assert all(0 < after <= 1.5 * before for before, after in zip(*errors, strict=True)), errors


CALLED = {
    "model.encoder.layers.1.self_attn.o_proj": "encoder",
    "model.encoder.layers.0": "encoder",
    "model.decoder.layers.1.encoder_attn.v_proj": "decoder",
    "model.decoder.layers.0.mlp": "decoder",
    "model.decoder.query_scale.layers.0": "decoder",
    "model.decoder.layernorm": "decoder",
    "model.decoder.ref_point_head": None,
    "class_labels_classifier": None,
}


@pytest.mark.parametrize("name", CALLED)
def test_hooks_fire_and_may_change_outputs(name):
    model = model_of(auxiliary_loss=True)
    calls = Counter()

    def hook(module, args, output):
        calls[name] += 1
        return output * 1.5

    model.get_submodule(name).register_forward_hook(hook)
    expected, fired = run(model, small_batch()), calls.total()
    report = accelerate(model)
    fallback = CALLED[name]
    assert paths_of(model) != FUSED if fallback else paths_of(model) == FUSED
    calls.clear()
    assert_same(run(model, small_batch()), expected)
    assert calls.total() == fired > 0
    [part] = report.hooks
    assert part.note == "hooks: " + (
        f"the layers of the {fallback} are called as modules" if fallback else "called as before, nothing falls back"
    )


def test_modules_are_called_if_fused_operations_cannot_run():
    model = model_of(attn_implementation="eager")
    accelerate(model)
    assert paths_of(model) != FUSED, "this attention was requested by name"
    model.set_attn_implementation({"": "sdpa", "backbone_config": "eager"})
    assert paths_of(model) == FUSED
    model.train()
    before = run(model, small_batch())
    model.gradient_checkpointing_enable()
    with conddetr.record_paths() as paths:
        assert_same(run(model, small_batch()), before)
    assert "fused operations" not in set(paths["encoder"]) | set(paths["decoder"])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_modules_are_called_if_dropout_rates_differ_within_a_layer(part):
    model = model_of(dropout=0.1)
    accelerate(model)
    mlp = getattr(model.model, part).layers[-1].mlp
    mlp.dropout = 0.2
    assert paths_of(model.eval()) == FUSED
    assert "fused operations" not in paths_of(model.train())[part]
    mlp.dropout = 0.1
    assert paths_of(model) == FUSED
    mlp.eval()
    assert "fused operations" not in paths_of(model)[part]


def test_trained_positions_get_their_gradients():
    config = small_config(position_embedding_type="learned", encoder_layers=2)
    torch.manual_seed(0)
    model = ConditionalDetrForObjectDetection(config).to(DEVICE)
    expected = run(model, small_batch())
    accelerate(model)
    assert_same(run(model, small_batch()), expected)
    assert any("row_embeddings" in name and value.any() for name, value in expected.items())


def test_dropout_has_the_rates_of_transformers_and_is_active_in_training_only(monkeypatch):
    rates = Counter()
    for name in ("add_norm", "relu_dropout"):
        inner = getattr(fast_layers, name)

        def record(*args, name=name, inner=inner, **options):
            rates[name, options["dropout_p"] if name == "add_norm" else args[1]] += 1
            return inner(*args, **options)

        monkeypatch.setattr(fast_layers, name, record)
    model = model_of(dropout=0.3, activation_dropout=0.2, attention_dropout=0.1)
    accelerate(model)
    forward(model.train())
    # Two branches in each of two encoder layers, three in each of two decoder layers; no dropout after λ's ReLU.
    assert rates == {("add_norm", 0.3): 10, ("relu_dropout", 0.2): 4}
    outputs = []
    for seed, train in ((1, True), (1, True), (2, True), (1, False), (2, False)):
        torch.manual_seed(seed)
        outputs.append(forward(model.train(train)).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    torch.testing.assert_close(outputs[3], outputs[4], rtol=0, atol=0)
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[3])


def test_weights_of_timms_resnet_are_prepared_at_once():
    pytest.importorskip("timm", reason="timm is not installed (pip install -e .[test])")
    model = model_of(use_timm_backbone=True, backbone="resnet18", backbone_config=None)
    expected = run(model, small_batch())
    accelerate(model)
    with conddetr.record_paths() as paths:
        assert_same(run(model, small_batch()), expected, 1e-3)
    assert set(paths["backbone"]) == {"norms folded before"}
    assert paths["prepare_weights"].total() == 3
