"""The frozen copy for inference: the model's numbers, separate weights, and parts that stay modules."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, weight_norm
from torch.utils.flop_counter import FlopCounterMode

import conddetr
from conddetr.model.fused import FusedBlock, FusedConvolution, fused_copy

SMALL = {"hidden_dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 1, "ffn_dim": 32, "num_queries": 7}


def make_model(backend="eager", preset="conditional-detr-r50"):
    torch.manual_seed(0)
    model = conddetr.build(preset, backend=backend, **SMALL).eval()
    for buffer in model.backbone.buffers():
        buffer.uniform_(0.8, 1.2)
    return model


@pytest.fixture
def image():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("preset", ["conditional-detr-r50", "conditional-detr-dc5-r50", "detr-r50"])
def test_outputs_equal_the_models_in_float64(preset, image):
    model = make_model(preset=preset).double()
    fused = model.fused()
    assert len(fused.fusion.fused) == 17
    assert fused.fusion.left == {}
    assert not [module for module in fused.modules() if "BatchNorm" in type(module).__name__]
    for name, expected in model(image.double()).items():
        if name != "aux_outputs":
            torch.testing.assert_close(fused(image.double())[name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_outputs_of_each_backend_equal_the_models(backend, image):
    model = make_model(backend)
    with torch.inference_mode():
        expected = make_model().double()(image.double())
        outputs = model.fused()(image)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(outputs[name].double(), expected[name], rtol=0, atol=1e-4)
    chosen = model.fused("auto")
    assert {module.backend for module in chosen.modules() if hasattr(module, "backend")} == {"auto"}
    assert (chosen.backend, model.backend) == ("auto", backend)


def test_the_copy_is_frozen_and_has_separate_weights(image):
    model = make_model()
    with torch.no_grad():
        fused, before = model.fused(), model(image)["pred_logits"]
        for weight in model.parameters():
            weight.data.mul_(1.1)
        torch.testing.assert_close(fused(image)["pred_logits"], before, rtol=0, atol=1e-4)
        changed = model(image)["pred_logits"]
        assert not torch.allclose(changed, before, rtol=0, atol=1e-2)
        torch.testing.assert_close(model.fused()(image)["pred_logits"], changed, rtol=0, atol=1e-4)
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert storages.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in fused.state_dict().values())
    assert not any(weight.requires_grad for weight in fused.parameters())
    assert not fused.training
    with pytest.raises(RuntimeError, match="frozen copy for inference"):
        fused.train()
    again = copy.deepcopy(fused).fused()
    assert again.fusion == fused.fusion
    assert torch.equal(again(image)["pred_logits"], fused(image)["pred_logits"])


class Recorder:
    """Counts calls. Its method serves as a hook, which must not be copied with the object."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *_):
        self.calls += 1

    def see(self, *_):
        self.calls += 1


def test_hooked_parts_stay_and_their_hooks_fire(image):
    model, by_call, by_method = make_model("auto"), Recorder(), Recorder()
    body = model.backbone[0].body
    body.layer2[1].conv2.register_forward_hook(by_call)
    body.layer4.register_forward_pre_hook(by_method.see)
    model.transformer.decoder.layers[0].cross_attn.register_forward_hook(by_call)
    fused = model.fused()
    assert fused.fusion.left == {
        "backbone.0.body.layer2.1": "conv2: it has hooks",
        "backbone.0.body.layer4": "it has hooks",
    }
    assert "layer2.1: conv2: it has hooks" in str(fused.fusion)
    # The stem and 3 + 3 + 6 blocks.
    assert len(fused.fusion.fused) == 13
    with torch.no_grad():
        torch.testing.assert_close(fused(image)["pred_logits"], model(image)["pred_logits"], rtol=0, atol=1e-4)
    assert (by_call.calls, by_method.calls) == (4, 2)


def test_hooks_of_the_copy_fire(image):
    fused, calls = make_model("auto").fused(), []
    for module in fused.modules():
        module.register_forward_hook(lambda module, *_: calls.append(type(module)))
    fused(image)
    assert calls.count(FusedBlock) == 16
    assert calls.count(FusedConvolution) == 53


@pytest.mark.parametrize("name", ["layer1.0", "layer1.1.convolutions.2", "layer2.0.downsample", "layer3"])
def test_outputs_seen_by_a_hook_of_the_copy_are_not_overwritten(name, image):
    fused, outputs = make_model().fused(), []
    fused.backbone[0].body.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: outputs.append((output, output.clone()))
    )
    with torch.no_grad():
        fused(image)
    assert torch.equal(*outputs[0])


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 1.5 * self.inner(x)


def test_parametrised_wrapped_and_normalised_parts_are_not_fused(image):
    model = make_model()
    body = model.backbone[0].body
    parametrize.register_parametrization(body.layer1[1].conv1, "weight", Scaled())
    body.layer3[2] = Wrapped(body.layer3[2])
    # The old weight norm leaves a weight with a graph, which cannot be copied directly.
    weight_norm(body.layer2[0].conv2)
    weight_norm(model.class_embed)
    expected = model(image)
    fused = model.fused()
    assert {name.removeprefix("backbone.0.body.") for name in fused.fusion.left} == {"layer1.1", "layer2.0", "layer3.2"}
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(fused(image)[name], expected[name].detach(), rtol=0, atol=1e-4)


def test_a_backbone_without_frozen_norms_is_only_copied(image):
    model = conddetr.build("conditional-detr-tiny").eval()
    fused = model.fused()
    assert (fused.fusion.fused, fused.fusion.left) == ([], {})
    assert torch.equal(fused(image)["pred_logits"], model(image)["pred_logits"])


def test_a_wrapped_backbone_is_fused_inside(image):
    model = make_model()
    model.backbone = Wrapped(model.backbone)
    fused = model.fused()
    assert len(fused.fusion.fused) == 17
    torch.testing.assert_close(fused(image)["pred_logits"], model(image)["pred_logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_flops_of_the_copy_equal_the_models(backend, image):
    """With the same backend."""
    counts = {}
    with torch.no_grad():
        for name, model in (("plain", make_model(backend)), ("fused", make_model(backend).fused())):
            with FlopCounterMode(display=False) as counter:
                model(image)
            counts[name] = counter.get_total_flops()
    assert counts["fused"] == counts["plain"] > 1e9


@pytest.mark.parametrize("hooked", [None, "layer2.1"])
def test_a_copy_in_half_precision_casts_its_inputs(image, hooked):
    """Fused weights are stored in that dtype; parts that are not fused keep their dtype and need autocast."""
    body, image = make_model("auto").backbone[0].body, image[..., ::2, ::2]
    if hooked is not None:
        body.get_submodule(hooked).register_forward_hook(lambda *_: None)
    copied, report = fused_copy(body, torch.bfloat16)
    assert list(report.left) == ([] if hooked is None else [hooked])
    fused = [module for module in copied.modules() if isinstance(module, FusedConvolution)]
    assert {weight.dtype for module in fused for weight in module.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        exact = copy.deepcopy(body).double()(image.double())
        in_half = copy.deepcopy(body).bfloat16()(image.bfloat16())
        if hooked is None:
            assert torch.equal(copied(image), copied(image.bfloat16()))
        with torch.autocast("cpu", torch.bfloat16):
            features = copied(image)
    assert features.dtype == torch.bfloat16
    error, allowed = ((x.double() - exact).abs().max() for x in (features, in_half))
    assert error <= 2 * allowed


def test_a_copy_in_half_precision_enables_autocast_itself():
    """It takes float32 pixels and returns the values of autocast, except that its norms are folded before rounding."""
    torch.manual_seed(0)
    model = conddetr.build("conditional-detr-r50", num_classes=3, encoder_layers=1, decoder_layers=1).eval()
    nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.1)
    copy = model.fused(dtype=torch.bfloat16)
    image = torch.randn(1, 3, 64, 96)
    assert copy.dtype == image.dtype
    with torch.no_grad():
        exact = model(image)["pred_boxes"]
        with torch.autocast("cpu", torch.bfloat16):
            plain = model(image)["pred_boxes"]
        boxes = copy(image)["pred_boxes"]
    assert boxes.dtype == torch.float32
    assert copy.fused().autocast == torch.bfloat16
    assert 0 < (boxes - exact).norm() <= 2 * (plain - exact).norm()
