"""Exported files in their runtimes, compared with the model on sizes and batches that the export did not use."""

import json
import sys

import pytest
import torch

import conddetr
from conddetr.export import export

SMALL = {"hidden_dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 2, "ffn_dim": 32, "num_queries": 7}
IS_OLD = torch.__version__.startswith("2.11.")
"""PyTorch 2.11 cannot trace a ResNet for any image size."""
SHAPES = [(1, 3, 65, 120), (4, 3, 97, 70)]


def build(preset, **options):
    model = conddetr.build(preset, num_classes=3, **options).eval()
    # The initial weights are zero, and all boxes would be the reference points.
    torch.nn.init.normal_(model.bbox_embed.layers[-1].weight)
    for name, buffer in model.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    return model


def run_onnx(path):
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    description = json.loads(session.get_modelmeta().custom_metadata_map["conddetr"])
    return lambda images: map(
        torch.from_numpy, session.run(["logits", "boxes"], {"images": images.numpy()})
    ), description


def run_torch(path):
    extra = {"conddetr.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra["conddetr.json"])


@pytest.mark.gpu
@pytest.mark.compares_numbers
@pytest.mark.parametrize(
    ("preset", "options", "format", "size"),
    [
        pytest.param("conditional-detr-tiny", {"backend": "triton"}, "torch", None, marks=pytest.mark.slow),
        ("detr-tiny", {}, "onnx", (64, 96)),
        pytest.param(
            *("conditional-detr-r50", {**SMALL, "image_size": 96}, "onnx", (64, 96) if IS_OLD else None),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_exported_files_give_the_outputs_of_the_model(tmp_path, preset, options, format, size):
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="ONNX export needs onnx, onnxscript and onnxruntime")
    model = build(preset, **options)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "new" / ("model.onnx" if format == "onnx" else "model.pt2")
    classes = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 90, "name": "toothbrush"}]
    report = export(model, path, format, size, classes)
    assert report.difference <= 1e-4
    assert [file.name for file in path.parent.iterdir()] == [path.name]

    device = "cuda" if options.get("backend") == "triton" and torch.cuda.is_available() else "cpu"
    model.to(device)
    run, description = run_onnx(path) if format == "onnx" else run_torch(path)
    assert description["classes"] == classes
    assert description["activation"] == model.config.activation
    for shape in SHAPES if size is None else [(1, 3, *size), (5, 3, *size)]:
        images = torch.randn(shape)
        with torch.no_grad():
            expected = model(images.to(device))
        for name, output in zip(("pred_logits", "pred_boxes"), run(images), strict=True):
            torch.testing.assert_close(output, expected[name].cpu(), atol=1e-4, rtol=0)
    # The model has not changed.
    assert model.config.aux_loss
    assert all(parameter.requires_grad for parameter in model.class_embed.parameters())
    torch.testing.assert_close(dict(model.cpu().state_dict()), weights, rtol=0, atol=0)


def test_file_that_fails_the_check_is_not_kept_and_the_old_one_stays(tmp_path):
    model = build("conditional-detr-tiny")
    torch.nn.init.constant_(model.class_embed.bias, float("nan"))
    path = tmp_path / "model.pt2"
    path.write_text("old")
    with pytest.raises(FloatingPointError, match=r"pred_logits differ from the model's by nan .* nothing was written"):
        export(model, path, "torch", size=(32, 32))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "old"


def test_error_names_missing_packages_before_any_work(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs .*onnxruntime: pip install 'conddetr\[export\]'"):
        export(tiny_model, tmp_path / "new" / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not IS_OLD, reason="newer PyTorch can trace a ResNet for any image size")
def test_error_requires_a_fixed_size_if_this_pytorch_needs_one(tmp_path):
    with pytest.raises(ValueError, match=r"PyTorch 2\.11.* cannot trace .*: fix the size with size="):
        export(build("conditional-detr-r50", **SMALL), tmp_path / "model.pt2", "torch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model.onnx", "onxx"), "format: expected one of torch, onnx, got 'onxx'"),
        (("model.pt", "torch"), r"path: format 'torch' needs a name ending in \.pt2, got 'model\.pt'"),
        (("model.pt2", "torch", (0, 5)), r"size: expected a height and width of at least 1, got \(0, 5\)"),
    ],
)
def test_errors_name_bad_arguments(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        export(tiny_model, *arguments)
