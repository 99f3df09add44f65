"""In an accelerated model every module is still called: hooked, replaced, wrapped and patched ones run."""

import copy
from collections import Counter

import pytest
import torch
from official_contract import ConditionalDETR, SetCriterion, Transformer
from torch import nn

import conddetr
from conddetr.kernels import registry

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")

from small_huggingface import run, small_batch, small_dab, small_model
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

IS_OLD = hasattr(modeling, "DetrAttention")
"""Before transformers 5: the decoder layers hold the projections."""


@pytest.fixture(params=["eager", "auto", "no kernel"])
def accelerate(request, monkeypatch):
    """With `eager`, `auto`, and as on a machine without kernels, where transformers' own attention runs."""
    if request.param == "no kernel":
        monkeypatch.setattr(registry, "why_not", lambda *_, **__: "not built")
    return lambda model: conddetr.accelerate(model, "eager" if request.param == "eager" else "auto")


def count_calls(model):
    """Number of calls of each module's hooks, outside the backbone.

    transformers changes boxes in place, where PyTorch does not allow backward hooks.
    """
    counts, handles = Counter(), []
    for name, module in model.named_modules():
        if "backbone" in name:
            continue
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: counts.update([f"{name} before"])),
            module.register_forward_hook(lambda *_, name=name: counts.update([f"{name} after"])),
        ]
        if ".layers." in name and "bbox" not in name:
            hook = module.register_full_backward_hook(lambda *_, name=name: counts.update([f"{name} backward"]))
            handles.append(hook)
    run(model, small_batch())
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("make", [small_model, small_dab])
def test_hooks_fire_as_often_as_in_the_plain_model(make, accelerate):
    model = make(auxiliary_loss=True).train()
    expected = count_calls(model)
    assert max(expected.values()) > 1
    accelerate(model)
    assert count_calls(model) == expected


each_implementation = pytest.mark.parametrize("implementation", ["default", "eager"])


def model_with(implementation):
    """From transformers 5 on, the default is PyTorch's fused attention."""
    return small_model() if implementation == "default" else small_model(attn_implementation=implementation)


@each_implementation
def test_layers_get_the_same_mask_as_in_transformers(implementation, accelerate):
    model = model_with(implementation)
    masks = []

    def keep(module, args, kwargs):
        masks.append(kwargs["encoder_attention_mask"])

    model.model.decoder.layers[1].register_forward_pre_hook(keep, with_kwargs=True)
    run(model, small_batch())
    accelerate(model)
    run(model, small_batch())
    assert masks[1].dtype == masks[0].dtype
    assert torch.equal(masks[1], masks[0])
    assert masks[0].unique().numel() == 2, "without padding this test proves nothing"


@each_implementation
def test_original_cross_attention_inserted_later_runs(implementation, accelerate):
    model = model_with(implementation)
    expected = run(model, small_batch())
    shipped = copy.deepcopy(model.model.decoder.layers[1].encoder_attn)
    accelerate(model)
    model.model.decoder.layers[1].encoder_attn = shipped
    outputs = run(model, small_batch())
    torch.testing.assert_close(outputs["logits"], expected["logits"], atol=1e-4, rtol=0)


def test_wrapped_and_subclassed_projections_run(accelerate):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 1.5

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0.5

    model = small_model()
    decoder, encoder = model.model.decoder, model.model.encoder
    holder = decoder.layers[1] if IS_OLD else decoder.layers[1].encoder_attn
    for parent, name in (
        (holder, "ca_kcontent_proj" if IS_OLD else "k_content_proj"),
        (holder, "ca_v_proj" if IS_OLD else "v_proj"),
        (encoder.layers[0].self_attn, "k_proj"),
        (decoder, "query_scale"),
        (decoder, "ref_point_head"),
        (decoder, "layernorm"),
    ):
        setattr(parent, name, Wrapped(getattr(parent, name)))
    projection = holder.ca_qpos_sine_proj if IS_OLD else holder.q_pos_sine_proj
    projection.__class__ = Scaled
    expected = run(model, small_batch())
    accelerate(model)
    outputs = run(model, small_batch())
    for name in ("logits", "boxes", "loss"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-4, rtol=1e-4, msg=name)


def test_a_forward_set_on_a_module_runs(accelerate):
    """Set before, it hides ours, and the report says so; set after, it may call the previous one."""
    model = small_model()
    expected = run(model, small_batch())
    calls = Counter()

    def count(module, name):
        inner = module.forward

        def forward(*args, **kwargs):
            calls[name] += 1
            return inner(*args, **kwargs)

        module.forward = forward

    count(model.model.decoder.layers[0].encoder_attn, "before")
    report = accelerate(model)
    assert [(part.name, part.note) for part in report.hooks] == [
        ("model.decoder.layers.0.encoder_attn", "its own forward: it runs instead of ours")
    ]
    name = "decoder attention" if IS_OLD else "cross-attention"
    assert (name, 1, "their own forward runs") in [(p.name, p.count, p.note) for p in report.left]
    count(model.model.decoder, "decoder")
    count(model.model.decoder.layers[2].encoder_attn, "after")
    count(model.model.decoder.layers[1], "layer")
    outputs = run(model, small_batch())
    torch.testing.assert_close(outputs["logits"], expected["logits"], atol=1e-4, rtol=0)
    assert calls == {"before": 1, "after": 1, "decoder": 1, "layer": 1}
    with torch.no_grad():
        assert len(model(**small_batch(), output_hidden_states=True).decoder_hidden_states) == 4
    assert calls["decoder"] == 2


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_the_same_layers_are_dropped_as_in_transformers(probability, accelerate):
    model = small_model(decoder_layerdrop=probability).train()

    def logits():
        torch.manual_seed(1)
        with torch.no_grad():
            return model(**small_batch()).logits

    expected = logits()
    accelerate(model)
    torch.testing.assert_close(logits(), expected, atol=1e-4, rtol=0)
    model.model.decoder.layerdrop = 0.0
    assert not torch.allclose(logits(), expected, atol=1e-2)


def test_subclass_by_a_user_stays_and_is_listed():
    model = small_model()
    attention = model.model.decoder.layers[1].encoder_attn

    class Custom(type(attention)):
        pass

    attention.__class__ = Custom
    report = conddetr.accelerate(model, "eager")
    name = "decoder attention" if IS_OLD else "cross-attention"
    assert ("Custom is another class and stays", 1) in [(p.note, p.count) for p in report.left if p.name == name]
    assert type(attention) is Custom
    assert [part.count for part in report.replaced if part.name == name] == [5 if IS_OLD else 2]


def test_report_lists_all_hooks_except_those_of_transformers():
    model = small_model(attn_implementation="eager")
    with torch.no_grad():
        model(**small_batch(), output_attentions=True)
    assert conddetr.accelerate(model).hooks == []
    for layer in model.model.decoder.layers:
        layer.register_forward_hook(lambda *_: None)
    model.class_labels_classifier.register_full_backward_pre_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(model.bbox_predictor.layers[0])
    hooks = {part.name: (part.count, part.note) for part in conddetr.accelerate(model).hooks}
    note = "called as before, nothing falls back"
    layers = "model.decoder.layers.0, model.decoder.layers.1, model.decoder.layers.2 and 1 more"
    assert hooks == {layers: (4, f"hooks: {note}"), "bbox_predictor.layers.0": (1, f"parametrizations: {note}")}
    assert "has hooks" in str(conddetr.accelerate(model))


def test_a_projection_in_float32_under_autocast():
    """As with adapters and quantised layers: PyTorch's attention accepts it, so ours does too."""

    class InFloat32(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    model = small_model()
    layer = model.model.decoder.layers[1]
    projections = [layer.ca_kcontent_proj, layer.sa_v_proj] if IS_OLD else [
        layer.encoder_attn.k_content_proj, layer.self_attn.v_proj, model.model.encoder.layers[0].self_attn.k_proj
    ]  # fmt: skip
    for projection in projections:
        projection.__class__ = InFloat32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**small_batch()).logits
        conddetr.accelerate(model, "eager")
        logits = model(**small_batch()).logits
    assert logits.dtype == expected.dtype
    torch.testing.assert_close(logits, expected, atol=0.1, rtol=0)


def test_official_code_runs_if_ours_would_not_call_a_module():
    model = ConditionalDETR(Transformer(layers=2, ffn=64), num_classes=5, num_queries=12).eval()
    images, calls = [torch.randn(3, 64, 96)], []
    linear = model.transformer.decoder.layers[1].linear1
    with torch.no_grad():
        expected = model(images)["pred_logits"]
        conddetr.accelerate(model)
        assert not torch.equal(model(images)["pred_logits"], expected), "nothing was accelerated"

        handle = linear.register_full_backward_pre_hook(lambda *_: None)
        report = conddetr.accelerate(model)
        note = "hooks: the official code of the transformer runs while they are attached"
        assert [(p.name, p.note) for p in report.hooks] == [("transformer.decoder.layers.1.linear1", note)]
        handle.remove()
        assert conddetr.accelerate(model).hooks == []

        linear.forward = lambda x: calls.append(1) or nn.functional.linear(x, linear.weight, linear.bias)
        model(images)
        del linear.forward
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(2) if m is linear else None)
        model(images)
        handle.remove()
        model(images)
    assert calls == [1, 2]


def test_official_criterion_calls_a_matcher_with_hooks():
    criterion, calls = SetCriterion(num_classes=5), []
    conddetr.accelerate(criterion)
    outputs = {"pred_logits": torch.randn(1, 12, 5), "pred_boxes": torch.rand(1, 12, 4) * 0.4 + 0.2, "aux_outputs": []}
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    expected = criterion(outputs, targets)
    criterion.matcher.register_forward_hook(lambda *_: calls.append(1))
    losses = criterion(outputs, targets)
    assert calls == [1]
    assert all(
        torch.allclose(losses[name], expected[name], atol=1e-5) for name in ("loss_ce", "loss_bbox", "loss_giou")
    )
