"""Exported files in their runtimes, compared with the model on sizes and batches that the export did not use."""

import importlib.util
import json
import math
import sys

import pytest
import torch

import conddetr
from conddetr.cli import main
from conddetr.export import export
from conddetr.export.check import compare_detections

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
    session = pytest.importorskip("onnxruntime", reason="runs the exported file").InferenceSession(
        path, providers=["CPUExecutionProvider"]
    )
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
        ("detr-tiny", SMALL, "onnx", (64, 96)),
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
    with pytest.raises(
        FloatingPointError, match=r"logits, run by PyTorch, differ from the model's by nan .* nothing was written"
    ):
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
        (("model.pt2", "torch", (64,)), r"size: expected a height and width of at least 1, got \(64,\)"),
        (("model.pt2", "torch", (0, 5)), r"size: expected a height and width of at least 1, got \(0, 5\)"),
    ],
)
def test_errors_name_bad_arguments(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        export(tiny_model, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "precision: expected one of float32, float16, got 'int8'"),
        ({"check_with": "tensorrt"}, "check_with: expected one of openvino, got 'tensorrt'"),
        ({"check_with": "openvino"}, "check_with: OpenVINO reads ONNX files, got format 'torch'"),
        ({"postprocess": True, "top_k": 0}, "top_k: expected at least 1, got 0"),
    ],
)
def test_errors_name_bad_options(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        export(tiny_model, "model.pt2", "torch", **options)


def test_top_k_without_postprocessing_is_an_error(capsys):
    assert main(["export", "--checkpoint", "absent.pt", "--top-k", "5"]) == 2
    assert "--top-k: the file returns all queries" in capsys.readouterr().err


def test_error_names_missing_openvino(tmp_path, tiny_model, monkeypatch):
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx, onnxscript and onnxruntime")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"The check with openvino needs it: pip install 'conddetr\[openvino\]'"):
        export(tiny_model, tmp_path / "new" / "model.onnx", check_with="openvino")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("preset", "precision", "tolerance"), [("detr-tiny", "float32", 1e-4), ("conditional-detr-tiny", "float16", 1e-2)]
)
def test_file_with_postprocessing_returns_the_models_detections(tmp_path, preset, precision, tolerance):
    """With sharp logits the order of detections is clear; the check of the file compares close ones."""
    onnx = pytest.importorskip("onnx", reason="ONNX export needs onnx, onnxscript and onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="runs the exported file")
    model = build(preset, **SMALL)
    torch.nn.init.normal_(model.class_embed.weight, std=2.0)
    check_with = "openvino" if importlib.util.find_spec("openvino") and precision == "float32" else ""
    options = {"postprocess": True, "top_k": 5, "precision": precision, "check_with": check_with}
    report = export(model, tmp_path / "model.onnx", size=(64, 96), **options)
    assert report.runtimes == ("onnxruntime", *(["OpenVINO"] if check_with else []))
    assert 0 < report.difference <= tolerance

    session = runtime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    description = json.loads(session.get_modelmeta().custom_metadata_map["conddetr"])
    assert [entry.name for entry in session.get_inputs()] == list(description["inputs"]) == ["images", "sizes"]
    assert list(description["outputs"]) == ["scores", "labels", "boxes"]
    assert (description["top_k"], description["precision"]) == (5, precision)
    images, sizes = torch.randn(4, 3, 64, 96), torch.tensor([[480, 640], [100, 900], [333, 500], [64, 96]])
    with torch.no_grad():
        expected = conddetr.postprocess(model(images), sizes, 5, model.config.activation)
    outputs = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
    assert [(output.dtype.name, output.shape) for output in outputs] == [
        ("float32", (4, 5)),
        ("int64", (4, 5)),
        ("float32", (4, 5, 4)),
    ]
    for index, detections in enumerate(expected):
        scores, labels, boxes = (torch.from_numpy(output[index]) for output in outputs)
        torch.testing.assert_close(scores, detections["scores"], atol=tolerance, rtol=0)
        if precision == "float32":
            assert torch.equal(labels, detections["labels"])
            torch.testing.assert_close(boxes, detections["boxes"], atol=tolerance * 900, rtol=0)
    kinds = {tensor.data_type for tensor in onnx.load(report.path).graph.initializer if len(tensor.dims) > 1}
    assert (onnx.TensorProto.FLOAT16 in kinds) == (precision == "float16")
    assert onnx.TensorProto.FLOAT in kinds, "heads are float32"


def detections_of_four_queries(activation):
    logits = torch.tensor([[[4.0, -9.0, 0.0], [3.0, -9.0, 0.0], [-9.0, 3.00001, 0.0], [-9.0, -9.0, 0.0]]])
    output = {"pred_logits": logits, "pred_boxes": torch.rand(1, 4, 4) * 0.5 + 0.1}
    sizes = torch.tensor([[100, 300]])
    detections = conddetr.postprocess(output, sizes, 2, activation)[0]
    return output, sizes, [detections[name][None] for name in ("scores", "labels", "boxes")]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_comparison_allows_rounding_to_exchange_close_detections_and_nothing_else(activation):
    output, sizes, (scores, labels, boxes) = detections_of_four_queries(activation)

    def difference(*detections):
        [value] = compare_detections(output, sizes, detections, 2, activation, 1e-4).values()
        return value

    assert difference(scores, labels, boxes) < 1e-6
    rounded = {**output, "pred_logits": output["pred_logits"].round(decimals=4)}
    rounded["pred_logits"][0, 1, 0] += 1e-5
    other = conddetr.postprocess(rounded, sizes, 2, activation)[0]
    assert other["queries"].tolist() != conddetr.postprocess(output, sizes, 2, activation)[0]["queries"].tolist()
    assert difference(*(other[name][None] for name in ("scores", "labels", "boxes"))) < 1e-4
    assert difference(scores, 1 - labels, boxes) > 0.1
    assert difference(scores, labels, boxes + torch.tensor([3.0, 0.0, 0.0, 0.0])) == pytest.approx(0.01, abs=1e-5)
    assert difference(scores + 0.01, labels, boxes) == pytest.approx(0.01, abs=1e-5)
    twice = [tensor[:, [0, 0]] for tensor in (scores, labels, boxes)]
    assert difference(*twice) > 1e-3, "one object twice"
    for bad in (scores.flip(1), scores * float("nan"), scores[:, :1]):
        assert math.isnan(difference(bad, labels, boxes))
