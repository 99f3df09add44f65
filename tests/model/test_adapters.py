"""Adapters, quantised layers and wrappers replace linear layers: outputs and gradients equal those of `eager`."""

import pytest
import torch
from torch import nn

import conddetr

NAMES = ("sa_v_proj", "ca_kcontent_proj", "ca_kpos_proj", "ca_v_proj", "ca_qpos_sine_proj", "linear1", "out_proj")


def make_models():
    """Models with backends eager and auto and the same weights, under which queries differ."""
    models = [conddetr.build("conditional-detr-tiny", num_classes=3, backend=b).eval() for b in ("eager", "auto")]
    generator = torch.Generator().manual_seed(0)
    for weight in (weight for weight in models[0].parameters() if weight.dim() > 1):
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
    models[1].load_state_dict(models[0].state_dict())
    return models


@pytest.fixture
def images():
    """Two images; in a batch the second is padded."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, height, width, generator=generator) for height, width in ((64, 96), (48, 70))]


def assert_models_agree(models, images, adapted):
    """Compare the outputs of both models, and gradients of the parameters that `adapted` returns."""
    outputs = [model(images) for model in models]
    for output in outputs:
        (output["pred_logits"].square().sum() + output["pred_boxes"].sum()).backward()
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(outputs[1][name], outputs[0][name], rtol=0, atol=1e-4)
    gradients = [[weight.grad for weight in adapted(model)] for model in models]
    # Largest of the whole model, because some are exactly zero: a key bias adds the same to all scores of a query.
    largest = max(weight.grad.abs().max().item() for weight in models[0].parameters() if weight.grad is not None)
    for eager, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-5 * largest)


class Halved(nn.Module):
    """A wrapper that has no weights itself and does not expose the wrapped module's weights as attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 0.5 * self.inner(x)


class Shifted(nn.Linear):
    """A subclass that computes more than x·Wᵀ + b."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.shift = nn.Parameter(torch.full((base.out_features,), 0.3))

    def forward(self, x):
        return super().forward(x) + self.shift * x.mean(-1, keepdim=True)


def without_bias(base):
    linear = nn.Linear(base.in_features, base.out_features, bias=False)
    linear.weight = base.weight
    return linear


@pytest.mark.parametrize("change", [Halved, Shifted, without_bias])
@pytest.mark.parametrize("name", ["ca_kcontent_proj", "ca_kpos_proj", "ca_v_proj", "sa_qcontent_proj", "linear2"])
def test_replaced_projections_are_called_and_others_stay_in_one_product(name, change, images):
    models = make_models()
    for model in models:
        last = model.transformer.decoder.layers[-1]
        setattr(last, name, change(getattr(last, name)))
    assert_models_agree(models, images, lambda model: getattr(model.transformer.decoder.layers[-1], name).parameters())
    with conddetr.record_paths() as paths:
        models[1](images)
    called = name.startswith(("ca_k", "ca_v"))
    # Two layers have three key and value projections each.
    assert paths["key projections"] == ({"one product": 5, "modules": 1} if called else {"one product": 6})


def test_hooks_of_projections_fire(images):
    model, called = make_models()[1], []
    for layer in model.transformer.decoder.layers:
        for name, module in layer.named_modules():
            module.register_forward_hook(lambda module, *_, name=name: called.append(name))
    model(images)
    assert set(NAMES) - {"out_proj"} <= set(called)


def test_wrapped_embeddings_are_called(images):
    models = make_models()
    for model in models:
        model.query_embed = Halved(model.query_embed)
    assert_models_agree(models, images, lambda model: model.query_embed.parameters())


@pytest.mark.parametrize("options", [{"target_modules": list(NAMES)}, {"target_modules": ["query_embed"]}], ids=str)
def test_lora_of_peft(options, images):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install -e .[test])")
    models = []
    for model in make_models():
        torch.manual_seed(2)
        config = peft.LoraConfig(**options, r=4, init_lora_weights=False, modules_to_save=["class_embed"])
        models.append(peft.get_peft_model(model, config).eval())
    assert_models_agree(models, images, lambda model: [p for name, p in model.named_parameters() if "lora" in name])
    assert all(p.grad is not None for p in models[1].parameters() if p.requires_grad)
    with torch.no_grad():
        before = models[1](images)["pred_logits"]
        fused = models[1].get_base_model().fused()(images)["pred_logits"]
        merged = models[1].merge_and_unload()
        after = merged(images)["pred_logits"]
    torch.testing.assert_close(fused, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)
    assert isinstance(merged, conddetr.DETR)


def test_quantised_layers(images):
    models = [
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
        for model in make_models()
    ]
    assert "DynamicQuantizedLinear" in repr(models[1].transformer.decoder.layers[0].ca_v_proj)
    with torch.no_grad():
        eager, ours = (model(images)["pred_logits"] for model in models)
        plain = make_models()[0](images)["pred_logits"]
    torch.testing.assert_close(ours, eager, rtol=0, atol=0.05 * eager.abs().max().item())
    assert not torch.equal(eager, plain)
