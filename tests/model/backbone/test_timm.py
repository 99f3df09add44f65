"""Backbones of timm: the sizes of their maps, their own statistics, their norms, and models that cannot be one."""

import math
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import normalize

import conddetr
from conddetr.config import resolve
from conddetr.config.run import resolve_run
from conddetr.data.images import MEAN, STD
from conddetr.export import SUFFIXES, export
from conddetr.model.backbone.timm import TimmBackbone
from conddetr.model.detr import pad_images
from conddetr.zoo import gflops
from tools.cached import ROOT, cached

timm = pytest.importorskip("timm", reason="timm is not installed (pip install -e .[test])")

MODELS = ("test_resnet", "test_convnext", "test_vit", "test_vit3", "test_mambaout")
"""A map whose size rounds up, one that rounds down, a ViT for any size, one that has an option for it, and NHWC."""

ONE_LAYER = {"encoder_layers": 1, "decoder_layers": 1, "image_size": 64, "max_image_size": 96}
"""Options of a small detector."""


def make(name, **options):
    torch.manual_seed(0)
    return TimmBackbone(resolve("conditional-detr-tiny", backbone=f"timm:{name}", **options), pretrained=False)


@pytest.fixture(scope="module", params=MODELS)
def backbone(request):
    return make(request.param).eval()


@settings(max_examples=6, deadline=None)
@given(height=st.integers(1, 100), width=st.integers(1, 100))
def test_map_has_one_cell_per_started_stride(backbone, height, width):
    """As the grid of the tokens and the padding mask assume."""
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, height, width))
    cells = math.ceil(height / backbone.stride), math.ceil(width / backbone.stride)
    assert features.shape == (1, backbone.num_channels, *cells)


def test_map_equals_that_of_timm_on_its_own_preprocessing(backbone):
    """The image is normalised with ImageNet's statistics for ours, with the model's for timm's."""
    own = timm.create_model(backbone.name.removeprefix("timm:"), features_only=True, out_indices=(-1,))
    # timm's norms count batches, frozen ones do not.
    assert all(
        name.endswith("num_batches_tracked")
        for name in own.load_state_dict(backbone.features.state_dict(), strict=False).missing_keys
    )
    data = timm.data.resolve_data_config({}, pretrained_cfg=own.pretrained_cfg)
    image = torch.rand(1, 3, *own.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        [expected] = own.eval()(normalize(image, data["mean"], data["std"]))
        actual = backbone(normalize(image, MEAN, STD))
    if actual.shape != expected.shape:
        expected = expected.permute(0, 3, 1, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_padding_is_zero_in_the_models_own_space(backbone):
    """What timm's model sees of a padded image is what it sees of the image alone, with zeros around it."""
    seen = []
    handle = backbone.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = [torch.randn(3, 40, 75), torch.randn(3, 65, 50)]
    with torch.no_grad():
        backbone(pad_images(images)[0])
        for image in images:
            backbone(image[None])
    handle.remove()
    batch, *alone = seen
    for padded, [single], image in zip(batch, alone, images, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(padded[:, :height, :width], single[:, :height, :width])
        for pixels in (padded, single):
            assert pixels[:, height:].abs().max() == pixels[:, :, width:].abs().max() == 0


def test_padding_of_the_batch_does_not_reach_far_cells():
    """A convolutional map of a padded image is that of the image alone, away from the padding."""
    backbone = make("test_resnet").eval()
    image = torch.randn(3, 32, 320)
    with torch.no_grad():
        alone = backbone(image[None])
        padded = backbone(pad_images([image, torch.zeros(3, 32, 400)])[0])[:1, ..., :10]
    torch.testing.assert_close(padded[..., :5], alone[..., :5], rtol=1e-4, atol=1e-4)
    assert not torch.equal(padded[..., 9], alone[..., 9])


@pytest.mark.parametrize("name", ["test_convnext", "test_vit3"])
def test_gradients_reach_every_trained_parameter(name):
    model = conddetr.build("conditional-detr-tiny", backbone=f"timm:{name}", num_classes=3)
    model([torch.randn(3, 50, 70), torch.randn(3, 33, 90)])["pred_logits"].square().sum().backward()
    gradients = {name: p.grad for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert len(gradients) > 5
    assert not [name for name, gradient in gradients.items() if gradient is None]


def test_parameters_beside_the_map_do_not_train():
    """HRNet has branches at higher resolution; several processes would wait for the gradients of their last parts."""
    backbone = make("hrnet_w18_small")
    backbone(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())
    assert not all(p.requires_grad for p in backbone.parameters())


def statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running_" in name}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_frozen_norms_stay_and_trained_ones_follow_the_images(name):
    for norm, changes in (("auto", False), ("train", True)):
        backbone = make(name, backbone_norm=norm).train()
        before = statistics(backbone)
        backbone(torch.randn(2, 3, 64, 64))
        after = statistics(backbone)
        assert before
        assert all(torch.equal(after[name], value) != changes for name, value in before.items())
        parameters = dict(backbone.named_parameters())
        assert all(
            (name.replace("running_mean", "weight") in parameters) == changes for name in before if "mean" in name
        )


def test_frozen_backbone_computes_the_same_in_training_as_in_inference(monkeypatch):
    """With stochastic depth, which Swin has by default."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **options, drop_path_rate=0.5))
    images = torch.randn(2, 3, 64, 64)
    for trains in (True, False):
        backbone = make("test_convnext", train_backbone=trains)
        assert any(p.requires_grad for p in backbone.parameters()) == trains
        backbone.train()
        with torch.no_grad():
            assert torch.equal(backbone(images), backbone.eval()(images)) != trains


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_resnett", "timm has no such model. Did you mean 'test_resnet' or"),
        ("resnet18.nope", "timm has no such weights. Known: .*tv_in1k"),
        ("convnext_tiny_in22k", "timm has this model under a newer name"),
        ("test_maxvit", r"test_maxvit does not take images of every size; for 63×193 pixels: height \(16\) must be"),
        ("test_vit_relpos", "does not take images of every size; for 31×177 pixels: Input height"),
        ("pit_ti_224", "its maps are taken by hooks"),
        ("levit_128s", "backbone_norm: timm cannot freeze BatchNorm1d, which is in timm:levit_128s: set backbone_norm"),
    ],
)
def test_errors_say_why_a_model_cannot_be_a_backbone(name, message):
    with pytest.raises(ValueError, match=message):
        make(name)


def test_map_of_another_size_than_the_stride_says_is_refused(monkeypatch):
    def create(*args, **options):
        features = original(*args, **options)
        features.feature_info.info[-1]["reduction"] = 16
        return features

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ValueError, match=r"expected a map of shape \(1, 96, 2, 3\) .* stride 16, got \(1, 96, 1, 2\)"):
        make("test_resnet")


def test_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"backbone timm:test_vit needs timm: pip install 'conddetr\[timm\]'\."):
        make("test_vit")


def test_errors_of_pretrained_weights_give_the_alternative(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no route to host. Try again.")

    with pytest.raises(
        ValueError, match=r"no pretrained weights of darknet17\. Start without: pretrained_backbone=False"
    ):
        conddetr.build("conditional-detr-timm:darknet17", pretrained_backbone=True)
    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(OSError, match=r"timm's resnet18 could not be downloaded \(no route to host\): download them"):
        conddetr.build("conditional-detr-timm:resnet18", pretrained_backbone=True)


def test_preset_names_the_backbone():
    for options in ({"backbone": "timm:resnet50d.a1_in1k"}, {"preset": "conditional-detr-timm:resnet50d.a1_in1k"}):
        run = resolve_run({"dataset": "photos", **options})
        assert run.preset == "conditional-detr-timm:resnet50d.a1_in1k"
        assert run.model == resolve("conditional-detr-r50", backbone="timm:resnet50d.a1_in1k") == resolve(run.preset)
        assert run.pretrained_backbone
    assert resolve("detr-timm:test_vit") == resolve("detr-r50", backbone="timm:test_vit")


def test_rows_of_the_documentation_are_counted():
    table = (ROOT / "docs" / "models.md").read_text().partition("## Backbones")[2]
    rows = re.findall(r"\| `([\w:]+)` \| ([\d,]+) \| ([\d.]+) \| (\d+) \|", table)
    rows = {
        name: (int(parameters.replace(",", "")), float(cost), int(stride)) for name, parameters, cost, stride in rows
    }
    for name in ("resnet18", "resnet34", "resnet50", "resnet101"):
        preset = conddetr.presets()[f"conditional-detr-{name.replace('resnet', 'r')}"]
        assert rows[name] == (preset.parameters, preset.gflops, 32)
    name = "timm:efficientnet_b0"
    model = conddetr.build(f"conditional-detr-{name}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sources = sorted(path for folder in ("conddetr", "kernels") for path in (ROOT / folder).rglob("*.py"))
    counted = cached("gflops", [*sources, torch.__version__, timm.__version__, name], lambda: gflops(model))
    assert rows[name] == (parameters, pytest.approx(counted, abs=0.01), model.backbone[0].stride)


def test_trained_detector_is_loaded_as_it_was_saved(tmp_path):
    """Through a training on synthetic shapes, with the statistics of the checkpoint, and without pretrained weights."""
    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
    detector = conddetr.Detector(
        "conditional-detr-tiny", **ONE_LAYER, device="cpu", backbone="timm:test_vit", pretrained_backbone=False
    )
    options = {"epochs": 1, "train_images": 8, "val_images": 2, "batch_size": 4, "workers": 0}
    detector.train(output_dir=str(tmp_path / "run"), **options)
    assert detector.run["preset"] == "conditional-detr-timm:test_vit"
    detector.model.backbone[0].shift.add_(0.25)
    again = conddetr.Detector.from_checkpoint(detector.save(tmp_path / "a.safetensors"), device="cpu")
    assert again.config == detector.config
    image = torch.rand(3, 61, 83)
    for a, b in zip(detector.predict(image, 0.0), again.predict(image, 0.0), strict=True):
        assert torch.equal(a.scores, b.scores)


def test_frozen_copy_calls_the_modules_and_says_so():
    model = conddetr.build("conditional-detr-tiny", backbone="timm:test_convnext", num_classes=3).eval()
    copied = model.fused()
    assert copied.fusion.left == {"backbone.0": "timm:test_convnext: modules of timm are called"}
    images = [torch.randn(3, 70, 64)]
    with torch.no_grad(), conddetr.record_paths() as paths:
        outputs = copied(images)
    assert paths["backbone"] == {"modules": 1}
    torch.testing.assert_close(outputs["pred_logits"], model(images)["pred_logits"])


def test_half_precision_is_close():
    model = conddetr.build("conditional-detr-tiny", backbone="timm:test_vit", num_classes=3).eval()
    images = [torch.randn(3, 70, 64)]
    with torch.no_grad():
        exact = model(images)["pred_logits"]
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(images)["pred_logits"], exact, atol=0.05, rtol=0)
        cast = model.bfloat16()([images[0].bfloat16()])["pred_logits"]
        torch.testing.assert_close(cast.float(), exact, atol=0.1, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format"), [("test_resnet", "onnx"), ("test_vit", "torch")])
def test_exported_file_gives_the_outputs_of_the_model(tmp_path, name, format):
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install -e .[export])")
    model = conddetr.build("conditional-detr-tiny", backbone=f"timm:{name}", num_classes=3, **ONE_LAYER).eval()
    report = export(model, tmp_path / f"a{SUFFIXES[format]}", format)
    # Images of any size, from two cells on.
    assert len(report.checked) == 3
    assert report.difference < 1e-4
