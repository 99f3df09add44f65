"""An accelerated model compared with itself before: in float64, and within twice its own float32 error."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from waiting import RefusesToWait, no_synchronisation

import conddetr
from conddetr.interop.accelerate import accelerate
from conddetr.kernels import conditional_attention, native, registry

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")

from small_huggingface import batch, run, small_config, small_model  # noqa: E402
from transformers import ConditionalDetrForObjectDetection  # noqa: E402
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss  # noqa: E402
from transformers.models.conditional_detr import modeling_conditional_detr as modeling  # noqa: E402

from conddetr.interop.huggingface import attention, loss  # noqa: E402
from conddetr.interop.huggingface.loss import detection_loss  # noqa: E402
from conddetr.interop.huggingface.replace import replacements  # noqa: E402

BACKENDS = ("eager", "triton", "native")


def device_of(backend):
    """The device on which a backend runs models as narrow as these: a GPU for Triton if there is one."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("backend", BACKENDS)
# transformers' own loss raises an error for boxes whose corners are not in order.
@pytest.mark.gpu
@pytest.mark.compares_numbers.with_args(ValueError)
def test_outputs_losses_and_gradients_stay(backend, is_padded, training):
    if backend == "native" and native.NOT_LOADED is not None:
        pytest.skip(native.NOT_LOADED)
    model = small_model(auxiliary_loss=training).train(training)
    truth = run(copy.deepcopy(model).double(), batch(is_padded, torch.float64))
    assert truth["logits"].std(1).min() > 0.02, "with equal queries this test proves nothing"
    model.to(device_of(backend))
    before = run(model, batch(is_padded))
    accelerate(model, backend)
    after = run(model, batch(is_padded))
    assert list(after) == list(before)
    # Gradients that are zero in exact arithmetic (key biases) have the rounding errors of the others.
    largest = max(value.abs().max() for name, value in truth.items() if name.startswith("gradient"))
    for name, expected in truth.items():
        error = (after[name] - expected).abs().max()
        scale = largest if name.startswith("gradient") else expected.abs().max().clamp(min=1)
        allowed = 2 * (before[name] - expected).abs().max() + 1e-6 * scale
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_exact_in_float64():
    model = small_model(auxiliary_loss=True).double().train()
    inputs = batch(True, torch.float64)
    before = run(model, inputs)
    accelerate(model, "eager")
    after = run(model, inputs)
    worst = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < worst < 1e-9, "0 would mean that nothing was replaced"


@pytest.mark.parametrize("name", ["resnet18", "resnet26"])
def test_backbone_of_timm_is_exact_in_float64(name):
    pytest.importorskip("timm", reason="timm is not installed (pip install -e .[test])")
    model = small_model(use_timm_backbone=True, backbone=name, backbone_config=None).double().train()
    for module in model.modules():
        if isinstance(module, modeling.ConditionalDetrFrozenBatchNorm2d):
            for buffer in (module.weight, module.running_var, module.bias, module.running_mean):
                buffer.uniform_(0.5, 1.5)
    inputs = batch(True, torch.float64)
    before = run(model, inputs)
    report = accelerate(model)
    assert "backbone" in [part.name for part in report.replaced]
    after = run(model, inputs)
    for value_name, expected in before.items():
        assert torch.allclose(after[value_name], expected, rtol=1e-8, atol=1e-8), value_name
    assert not torch.equal(after["logits"], before["logits"]), "nothing was replaced"

    # The copy for inference follows the weights.
    with torch.no_grad():
        first = model(**inputs).logits
        assert torch.allclose(first, before["logits"], rtol=1e-8, atol=1e-8)
        next(m for m in model.modules() if isinstance(m, modeling.ConditionalDetrConvEncoder)).model["bn1"].bias += 1
        second = model(**inputs).logits
    assert not torch.allclose(second, first, atol=1e-3)
    assert torch.allclose(second, run(model, inputs)["logits"], rtol=1e-8, atol=1e-8)


def test_auto_leaves_attention_to_transformers_without_a_kernel(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("our attention ran")

    monkeypatch.setattr(attention, "conditional_attention", refuse)
    model = small_model()
    accelerate(model, "eager")
    with pytest.raises(AssertionError, match="our attention ran"):
        model(**batch(True))
    monkeypatch.setattr(registry, "why_not", lambda *_, **__: "no GPU here")
    report = accelerate(model, "auto")
    notes = {part.name: part.note for part in report.left}
    assert (
        "transformers' own runs (eager on cpu; triton: no GPU here; native: no GPU here)"
        in notes["sine embedding, λ ⊙ p_s"]
    )
    run(model, batch(True))


OTHERS = {
    "resnet26d": ("part of the backbone", "its shortcut is more than a convolution and a frozen batch norm"),
    "mobilenetv3_small_050": ("backbone", "is not a ResNet of timm"),
    "seresnet18": ("part of the backbone", "SEModule is not part of a plain ResNet"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_unusual_parts_of_other_backbones_are_left_and_listed(name):
    part, reason = OTHERS[name]
    pytest.importorskip("timm", reason="timm is not installed (pip install -e .[test])")
    model = ConditionalDetrForObjectDetection(small_config(use_timm_backbone=True, backbone=name, backbone_config=None))
    model.eval()
    with torch.no_grad():
        expected = model(**batch(True)).logits
        report = accelerate(model, "eager")
        torch.testing.assert_close(model(**batch(True)).logits, expected, rtol=0, atol=1e-4)
    notes = {part.name: part.note for part in report.left}
    assert reason in notes[part]
    model(**batch(True)).loss.backward()


def test_state_dict_class_copies_and_pickles_stay():
    model = small_model()
    state = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    accelerate(model, "eager")
    assert type(model) is ConditionalDetrForObjectDetection
    assert [(name, value.data_ptr()) for name, value in model.state_dict().items()] == [
        (name, pointer) for name, (pointer, _) in state.items()
    ]
    with torch.no_grad():
        expected = model(**batch(True)).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(**batch(True)).logits, expected)
            accelerated = {replacement.ours for replacement in replacements(model)}
            assert accelerated <= {type(module) for module in twin.modules()}


@pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
def test_self_attention_is_native_on_cpus_only():
    model = small_model()
    names = {"encoder self-attention", "decoder self-attention"}
    if hasattr(modeling, "DetrAttention"):
        names = {"encoder self-attention", "decoder attention"}
    assert names <= {part.name for part in accelerate(model, "native").replaced}
    model(**batch(True)).loss.backward()
    if not hasattr(modeling, "DetrAttention"):
        assert names <= {part.name for part in accelerate(model, "eager").left}


def test_second_acceleration_changes_nothing():
    model = small_model()
    first = accelerate(model, "eager")
    classes = [type(module) for module in model.modules()]
    assert accelerate(model, "eager") == first
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_attention_maps_and_hidden_states_come_from_transformers(backend):
    if backend == "native" and native.NOT_LOADED is not None:
        pytest.skip(native.NOT_LOADED)
    model = small_model(attn_implementation="eager")
    options = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        before = model(**batch(True), **options)
        accelerate(model, backend)
        after = model(**batch(True), **options)
    for name in ("cross_attentions", "decoder_attentions", "encoder_attentions", "decoder_hidden_states"):
        assert len(after[name]) == len(before[name]) > 0
        assert all(torch.equal(a, b) for a, b in zip(after[name], before[name], strict=True)), name


def test_gradient_checkpointing_gives_the_same_gradients():
    if not small_model().supports_gradient_checkpointing:
        pytest.skip("transformers before 5 has no gradient checkpointing for this model")
    model = small_model(auxiliary_loss=True).train()
    accelerate(model, "eager")
    before = run(model, batch(True))
    model.gradient_checkpointing_enable()
    after = run(model, batch(True))
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


def test_dropout_has_the_rate_of_transformers_in_training_only(monkeypatch):
    rates = []

    def record(*args, dropout_p, **options):
        rates.append(dropout_p)
        return conditional_attention(*args, dropout_p=dropout_p, **options)

    monkeypatch.setattr(attention, "conditional_attention", record)
    model = small_model(attention_dropout=0.25, dropout=0.5)
    accelerate(model, "eager")
    with torch.no_grad():
        for training in (False, True):
            model.train(training)(**batch(False))
    assert rates == [0.0] * 3 + [0.25] * 3


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0), (15, 1)], ids=str)
@pytest.mark.parametrize("has_auxiliary", [False, True])
def test_loss_equals_the_loss_of_transformers(counts, has_auxiliary):
    config = small_config(auxiliary_loss=has_auxiliary, bbox_loss_coefficient=3, class_cost=1)
    shape = (config.decoder_layers, 2, config.num_queries)
    logits = (torch.randn(*shape, config.num_labels, dtype=torch.float64) * 2).requires_grad_()
    raw = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    labels = [
        {"class_labels": torch.randint(5, (count,)), "boxes": torch.rand(count, 4, dtype=torch.float64) * 0.4 + 0.2}
        for count in counts
    ]

    def evaluate(function):
        boxes = raw.sigmoid()
        auxiliary = (logits, boxes) if has_auxiliary else (None, None)
        loss, parts, outputs = function(logits[-1], labels, logits.device, boxes[-1], config, *auxiliary)
        return loss, parts, outputs, torch.autograd.grad(loss, (logits, raw))

    expected, actual = evaluate(DeformableDetrForObjectDetectionLoss), evaluate(detection_loss)
    assert torch.allclose(actual[0], expected[0], rtol=1e-6)
    assert set(actual[1]) == set(expected[1])
    assert all(torch.allclose(actual[1][k].double(), expected[1][k].double(), rtol=1e-6) for k in expected[1])
    assert (actual[2] is None) == (expected[2] is None)
    for a, b in zip(actual[2] or [], expected[2] or [], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(actual[3], expected[3], strict=True))


def test_unsupported_parts_are_left_and_listed(monkeypatch):
    model = small_model(focal_alpha=0.5)
    monkeypatch.setattr(modeling.ConditionalDetrDecoder, "forward", lambda self, something_new: something_new)
    report = accelerate(model, "eager")
    notes = {part.name: part.note for part in report.left}
    assert "something_new" in notes["sine embedding, λ ⊙ p_s"]
    assert "focal_alpha 0.5" in notes["matcher and loss"]
    assert type(model.model.decoder) is modeling.ConditionalDetrDecoder
    assert model.loss_function is DeformableDetrForObjectDetectionLoss
    assert "left as it was  matcher and loss" in str(report)

    monkeypatch.setattr("conddetr.interop.huggingface.replace.replacements", lambda model: [])
    model = small_model()
    assert f"its structure in transformers {transformers.__version__} is unknown" in str(accelerate(model))
    model.loss_function = lambda *args: None
    assert "its own loss function" in str(accelerate(model))


def test_other_models_and_backends_are_refused():
    with pytest.raises(TypeError, match=r"torch.nn.modules.linear.Linear.*conddetr.load_weights"):
        accelerate(nn.Linear(1, 1))
    model = small_model()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="backend: expected one of"):
        accelerate(model, "fast")
    with pytest.raises(RuntimeError, match="float64"):
        accelerate(model.double(), "triton")
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.gpu
@pytest.mark.compares_numbers
def test_our_own_model_changes_its_backend(tiny_model):
    image = torch.randn(1, 3, 64, 96).to(device_of("triton"))
    tiny_model.to(image.device)
    with torch.no_grad():
        before = tiny_model(image)["pred_logits"]
        report = accelerate(tiny_model, "triton")
        after = tiny_model(image)["pred_logits"]
    assert [part.count for part in report.replaced] == [1, 2]
    assert tiny_model.backend == "triton"
    assert torch.allclose(after, before, atol=1e-5)
    original = conddetr.build("detr-tiny", num_classes=3)
    assert "original DETR" in str(accelerate(original, "eager"))


def test_loss_has_the_requested_backend(monkeypatch):
    backends = []

    def record(config, backend):
        backends.append(backend)
        return conddetr.build_criterion(config, backend)

    monkeypatch.setattr(loss, "_build_criterion", record)
    model = small_model()
    for backend in ("eager", "auto"):
        accelerate(model, backend)
        model(**batch(False))
    assert backends == ["eager", "auto"]


def loss_inputs(config, device="cpu"):
    """Logits and boxes of all layers, and labels of two images."""
    shape = (config.decoder_layers, 2, config.num_queries)
    labels = [{"class_labels": torch.arange(n), "boxes": torch.rand(n, 4) * 0.4 + 0.2} for n in (3, 1)]
    labels = [{name: value.to(device) for name, value in label.items()} for label in labels]
    return torch.randn(*shape, config.num_labels).to(device), torch.rand(*shape, 4).to(device), labels


def test_original_loss_runs_with_another_alpha():
    """The configuration may change after the model was accelerated; the original matches with its own α."""
    config = small_config(auxiliary_loss=True)
    logits, boxes, labels = loss_inputs(config)
    config.focal_alpha = 0.9
    inputs = (4 * logits[-1], labels, logits.device, boxes[-1], config, 4 * logits, boxes)
    expected, actual = DeformableDetrForObjectDetectionLoss(*inputs), detection_loss(*inputs)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-5, atol=1e-6)


def test_nan_in_one_layer_does_not_change_the_others():
    """One image of one layer is not finite. The total is not either; the other parts equal transformers' without it."""
    config = small_config(auxiliary_loss=True)
    logits, boxes, labels = loss_inputs(config)

    def loss(function, value):
        logits[1, 0] = value
        return function(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)

    expected, actual = loss(DeformableDetrForObjectDetectionLoss, 0.0), loss(detection_loss, float("nan"))
    assert actual[0].isnan()
    assert actual[1]["loss_ce_1"].isnan()
    others = [name for name in expected[1] if not name.endswith("_1")]
    assert len(others) > 3
    for name in others:
        torch.testing.assert_close(actual[1][name].float(), expected[1][name].float(), rtol=1e-5, atol=1e-6)


def accelerated_loss(config, logits, boxes, labels):
    return detection_loss(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loss_does_not_wait_for_the_device():
    """Forward and backward, with labels that are on the GPU already, as in the Trainer."""
    config = small_config(auxiliary_loss=True)
    logits, boxes, labels = loss_inputs(config, "cuda")
    logits.requires_grad_()
    accelerated_loss(config, logits, boxes, labels)  # compiles
    with no_synchronisation():
        accelerated_loss(config, logits, boxes, labels)[0].backward()


@pytest.mark.gpu
def test_loss_on_a_simulated_gpu_does_not_wait(monkeypatch):
    monkeypatch.setattr(registry, "why_not", lambda *_, **__: None)
    config = small_config(auxiliary_loss=True)
    accelerated_loss(config, *loss_inputs(config, device_of("triton")))  # fills the caches
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = loss_inputs(config, "cuda")
        with RefusesToWait():
            total, parts, _ = accelerated_loss(config, *inputs)
    assert all(value.device.type == "cuda" for value in (total, *parts.values()))
