"""ResNets of all depths: fused and plain parts agree, norms are frozen or train, and weights are recognised."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import conddetr
from conddetr import record_paths
from conddetr.config import resolve
from conddetr.model.backbone.resnet import ResNetBackbone
from conddetr.weights.load import load_model

SMALL = {"hidden_dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 1, "ffn_dim": 32, "num_queries": 5}


def make(name, backend="eager", **options):
    torch.manual_seed(0)
    return ResNetBackbone(resolve("conditional-detr-r50", backbone=name, **options), pretrained=False, backend=backend)


def randomised(backbone):
    """Norms that change their input, so that a norm that is left out is seen."""
    for norm in backbone.modules():
        if isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean, std=0.1)
    return backbone


def test_map_is_that_of_torchvisions_model_with_the_same_weights():
    """Without the classifier, with norms as buffers."""
    torch.manual_seed(1)
    theirs = torchvision.models.resnet34(weights=None).eval()
    backbone = make("resnet34").eval()
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    backbone.body.load_state_dict({key: value for key, value in state.items() if "num_batches" not in key})
    seen = []
    theirs.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        theirs(images)
        features = backbone(images)
    assert features.shape == (1, backbone.num_channels, 3, 4)
    torch.testing.assert_close(features, seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [
        ("frozen", torch.float32),
        ("frozen", torch.float64),
        # Batch norm over a few cells amplifies rounding, so only float64 shows whether the function is the same.
        ("train", torch.float64),
    ],
)
def test_fused_outputs_and_gradients_equal_those_of_the_modules(norm, dtype):
    """The modules compute in float64. Only frozen norms are folded, with trained ones those before the second stage."""
    images = torch.randn(2, 3, 33, 47)
    exact = randomised(make("resnet18", backbone_norm=norm)).double()
    fused = make("resnet18", "auto", backbone_norm=norm).to(dtype)
    fused.load_state_dict(exact.state_dict())
    expected = exact(images.double())
    with record_paths() as paths:
        actual = fused(images.to(dtype))
    # The stem and 8 blocks.
    expected_paths = (
        {"norms folded in the graph": 9} if norm == "frozen" else {"norms folded in the graph": 3, "modules": 6}
    )
    assert paths["backbone"] == expected_paths
    for output in (actual, expected):
        output.square().mean().backward()
    exact_gradients = gradients_of(exact)
    assert gradients_of(fused).keys() == exact_gradients.keys()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    pairs = {"output": (actual, expected)}
    pairs |= {key: (value, exact_gradients[key]) for key, value in gradients_of(fused).items()}
    pairs |= {key: (value, exact.state_dict()[key]) for key, value in fused.state_dict().items() if "running" in key}
    for key, (value, reference) in pairs.items():
        error = (value.double() - reference).abs().max()
        assert error <= tolerance * reference.abs().max(), key


def gradients_of(backbone):
    return {key: parameter.grad for key, parameter in backbone.named_parameters() if parameter.grad is not None}


def test_trained_norms_train_where_stages_train():
    backbone = make("resnet18", backbone_norm="train")
    before = {key: value.clone() for key, value in backbone.state_dict().items() if "running_mean" in key}
    backbone(torch.randn(2, 3, 64, 64))
    changed = {key for key, value in before.items() if not torch.equal(backbone.state_dict()[key], value)}
    assert changed == {key for key in before if key.startswith(("body.layer2", "body.layer3", "body.layer4"))}


@pytest.mark.parametrize("norm", ["frozen", "train"])
def test_imagenet_weights_are_loaded_with_their_statistics(norm, monkeypatch):
    from torchvision.models import ResNet18_Weights

    weights = torchvision.models.resnet18(weights=None).state_dict()
    weights = {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in weights.items()}
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: weights)
    body = conddetr.build("conditional-detr-r18", pretrained_backbone=True, backbone_norm=norm).backbone[0].body
    loaded = {key: value for key, value in body.state_dict().items() if "num_batches" not in key}
    assert loaded.keys() == {key for key in weights if "num_batches" not in key and not key.startswith("fc.")}
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_depth_is_recognised_from_weights_alone(name):
    model = conddetr.build("conditional-detr-r50", backbone=name, num_classes=3, **SMALL)
    loaded, _ = load_model_of(model.state_dict())
    assert loaded.config.backbone == name
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def load_model_of(state):
    """With the number of heads, which weights do not show."""
    return load_model({"model": state, "args": {"nheads": SMALL["num_heads"]}})


def test_trained_norms_start_from_weights_with_frozen_ones():
    """Counts of batches, which frozen norms do not have, are not missing."""
    frozen = conddetr.build("conditional-detr-r18", num_classes=3, **SMALL)
    trained = conddetr.build("conditional-detr-r18", num_classes=3, backbone_norm="train", **SMALL)
    assert conddetr.load_weights(trained, frozen.state_dict()).complete
    assert conddetr.load_weights(frozen, trained.state_dict()).complete


def test_frozen_copy_leaves_trained_norms():
    model = conddetr.build("conditional-detr-r18", num_classes=3, backbone_norm="train", **SMALL).eval()
    copied = model.fused()
    left = {f"backbone.0.body.layer{stage}.{block}" for stage in (2, 3, 4) for block in (0, 1)}
    assert copied.fusion.left == dict.fromkeys(left, "BatchNorm2d: expected a frozen batch norm")
    images = [torch.randn(3, 64, 70)]
    with torch.no_grad():
        torch.testing.assert_close(copied(images)["pred_logits"], model(images)["pred_logits"], rtol=1e-4, atol=1e-4)
