"""The public detector: from our and official checkpoints, on every kind of image input."""

import argparse
import json

import numpy as np
import pytest
import torch
from golden_rule import read_arrays, rule_inputs, rule_model
from PIL import Image
from recorder import record
from small_runs import SMALL_MODEL

import conddetr
from conddetr.engine.checkpoint import save_checkpoint
from conddetr.graphed import Graphs

CLASSES = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 90, "name": "toothbrush"}]


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    path = tmp_path / "checkpoint.pt"
    content = {"model": tiny_model.state_dict(), "config": tiny_model.config.to_dict(), "classes": CLASSES}
    save_checkpoint(path, content)
    return path


def test_predict_takes_every_image_type_and_always_returns_a_list(checkpoint, tmp_path):
    detector = conddetr.Detector.from_checkpoint(checkpoint, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    sources = [str(path), path, Image.fromarray(pixels), pixels, tensor]
    results = [detector.predict(source, threshold=0.0) for source in sources]
    assert all(len(result) == 1 for result in results)
    together = detector.predict(sources, threshold=0.0)
    assert len(together) == 5
    for [detection], expected in zip(results, together, strict=True):
        torch.testing.assert_close(detection.boxes, results[0][0].boxes)
        torch.testing.assert_close(detection.scores, expected.scores)
        assert len(detection) == 75
        assert detection.names == [CLASSES[label]["name"] for label in detection.labels]


def test_boxes_are_in_pixels_of_the_original_image(checkpoint):
    detector = conddetr.Detector.from_checkpoint(checkpoint, device="cpu")
    image = torch.rand(3, 50, 200)
    [detection] = detector.predict(image, threshold=0.0, top_k=10)
    model_input = conddetr.data.images.prepare(image, 128, 213)
    expected = conddetr.postprocess(detector.model([model_input]), [(50, 200)], 10)[0]
    torch.testing.assert_close(detection.boxes, expected["boxes"])
    [empty] = detector.predict(image, threshold=1.0)
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 4)


def test_weights_are_loaded_with_auto_by_default(checkpoint, tiny_model):
    content = {"model": tiny_model.state_dict(), "config": tiny_model.config.to_dict(), "classes": CLASSES}
    for stored in ("eager", "triton"):
        save_checkpoint(
            checkpoint, {**content, "config": {**content["config"], "backend": stored, "pretrained_backbone": False}}
        )
        detector = conddetr.Detector.from_checkpoint(checkpoint, device="cpu")
        assert detector.config == tiny_model.config
    assert {part.backend for part in detector.model.parts_with_backend()} == {"auto"}
    assert conddetr.Detector.from_checkpoint(checkpoint, device="cpu", backend="eager").model.backend == "eager"
    again = conddetr.Detector("conditional-detr-tiny", weights=checkpoint, device="cpu", backend="eager")
    assert again.model.backend == "eager"


@pytest.mark.parametrize(("backend", "copies"), [("eager", 0), ("auto", 2)])
def test_eager_backend_runs_without_frozen_copies(backend, copies, tiny_model, small_coco, monkeypatch):
    calls, fused = [], conddetr.DETR.fused
    monkeypatch.setattr(conddetr.DETR, "fused", lambda *args, **options: calls.append(1) or fused(*args, **options))
    tiny_model.set_backend(backend)
    detector = conddetr.Detector(tiny_model, CLASSES, device="cpu")
    detector.predict([torch.rand(3, 40, 60)] * 2)
    detector.evaluate(workers=0, coco_path=str(small_coco.root))
    assert len(calls) == copies


class LinearRecorder:
    """Records weight shapes and result dtypes of all linear layers, in any copy of a model."""

    def __init__(self, monkeypatch):
        self.dtypes = set()
        linear = torch.nn.functional.linear

        def watched(x, weight, bias=None):
            result = linear(x, weight, bias)
            self.dtypes.add((tuple(weight.shape), result.dtype))
            return result

        monkeypatch.setattr(torch.nn.functional, "linear", watched)


@pytest.mark.parametrize("trained", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_detector_computes_in_its_precision(precision, trained, checkpoint, small_coco, monkeypatch):
    """Single images, frozen copies and evaluation, on a device where `auto` means bfloat16."""
    monkeypatch.setattr("conddetr.detector.has_bfloat16", lambda device: True)
    detector = conddetr.Detector.from_checkpoint(checkpoint, device="cpu", precision=precision)
    detector.run = trained and {"train": {"precision": trained}, "data": {}}
    expected = precision if precision != "auto" else trained or "bfloat16"
    assert detector.precision == detector.fused().precision == expected
    image, ffn, head = torch.rand(3, 50, 80), (256, 64), (3, 64)
    for run in (
        lambda: detector.predict(image),
        lambda: detector.predict([image, image]),
        lambda: detector.fused().predict(image),
        lambda: detector.evaluate(workers=0, coco_path=str(small_coco.root)),
    ):
        with monkeypatch.context() as patch:
            recorder = LinearRecorder(patch)
            run()
        assert (head, torch.float32) in recorder.dtypes
        assert (head, torch.bfloat16) not in recorder.dtypes
        assert {dtype for shape, dtype in recorder.dtypes if shape == ffn} == {getattr(torch, expected)}


def test_error_names_an_unknown_precision(checkpoint):
    for make in (
        lambda: conddetr.Detector.from_checkpoint(checkpoint, device="cpu", precision="bf16"),
        lambda: conddetr.Detector("conditional-detr-tiny", precision="bf16"),
    ):
        with pytest.raises(ValueError, match="precision: unknown value 'bf16'"):
            make()


def test_several_images_run_on_a_frozen_copy_whose_hooks_fire(checkpoint):
    detector, calls = conddetr.Detector.from_checkpoint(checkpoint, device="cpu"), []
    detector.model.class_embed.register_forward_hook(lambda *_: calls.append(1))
    images = [torch.rand(3, 40, 60), torch.rand(3, 50, 40)]
    before = detector.predict(images, threshold=0.0)
    assert len(calls) == 2
    frozen = detector.fused()
    # An in-place edit that does not raise the tensor's version.
    detector.model.class_embed.weight.data.mul_(3.0)
    after = detector.predict(images, threshold=0.0)
    for image, old, new in zip(images, before, after, strict=True):
        [kept], [moved] = (source.predict(image, threshold=0.0) for source in (frozen, detector))
        torch.testing.assert_close(kept.scores, old.scores)
        torch.testing.assert_close(moved.scores, new.scores)
        assert not torch.allclose(old.scores, new.scores, atol=1e-3)


def test_frozen_detector_cannot_be_trained_or_saved(checkpoint, tmp_path):
    frozen = conddetr.Detector.from_checkpoint(checkpoint, device="cpu").fused()
    with pytest.raises(ValueError, match=r"frozen copy \(Detector.fused\) cannot be trained: use the detector"):
        frozen.train(epochs=1)
    with pytest.raises(ValueError, match="cannot be saved"):
        frozen.save(tmp_path / "a.pt")


def test_frozen_detector_with_graphs_replays_them(checkpoint):
    detector = conddetr.Detector.from_checkpoint(checkpoint, device="cpu")
    images = [torch.rand(3, 40, 60), torch.rand(3, 50, 40), torch.rand(3, 40, 60)]
    expected = detector.fused().predict(images, threshold=0.0)
    frozen = detector.fused(graphs=True)
    frozen.model.graphs = Graphs(record)
    with conddetr.record_paths() as paths:
        detections = frozen.predict(images, threshold=0.0)
    assert paths["graph"] == {"replayed": 3}
    assert len(frozen.model.graphs) == 2
    for actual, wanted in zip(detections, expected, strict=True):
        torch.testing.assert_close(actual.scores, wanted.scores)
        torch.testing.assert_close(actual.boxes, wanted.boxes)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_detector_with_a_cast_model_works(checkpoint, cast, small_coco):
    detector, image = conddetr.Detector.from_checkpoint(checkpoint, device="cpu"), torch.rand(3, 50, 80)
    [expected] = detector.predict(image, threshold=0.0)
    getattr(detector.model, cast)()
    [detection] = detector.predict(image, threshold=0.0)
    torch.testing.assert_close(detection.scores.float(), expected.scores, rtol=0, atol=1e-2)
    assert len(detector.predict([image, image])) == 2
    _, maps = detector.attention(image)
    assert torch.isfinite(maps.weights).all()
    assert set(detector.evaluate(workers=0, coco_path=str(small_coco.root))) >= {"AP", "AR100"}


def test_another_default_dtype_changes_nothing(checkpoint):
    detector, image = conddetr.Detector.from_checkpoint(checkpoint, device="cpu"), torch.rand(3, 50, 80)
    [expected] = detector.predict(image, threshold=0.0)
    torch.set_default_dtype(torch.float64)
    try:
        [detection] = detector.predict(image, threshold=0.0)
        detector.attention(image)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(detection.boxes, expected.boxes)


def test_attention_of_the_best_and_of_named_queries(checkpoint):
    detector = conddetr.Detector.from_checkpoint(checkpoint, device="cpu")
    image = torch.rand(3, 50, 100)
    [ranked] = detector.predict(image, threshold=0.0)
    best, maps = detector.attention(image, top_k=4)
    assert maps.weights.shape == (3, 25, 4, 7, 14)
    # Every query once, in the order of its best class.
    queries = list(dict.fromkeys(ranked.queries.tolist()))
    assert best.queries.tolist() == queries[:4]
    assert best.captions[0] == f"{ranked.names[0]} {ranked.scores[0]:.2f}"

    named, _ = detector.attention(image, queries=[queries[3], 7], layer=0)
    torch.testing.assert_close(named.boxes[0], best.boxes[3])
    logits = detector.model([conddetr.data.images.prepare(image, 128, 213)])["pred_logits"][0, 7]
    assert named.labels[1] == logits.argmax()
    torch.testing.assert_close(named.scores[1], logits.detach().max().sigmoid())
    with pytest.raises(ValueError, match="queries: expected 0 to 24, got 25"):
        detector.attention(image, queries=[25])
    with pytest.raises(ValueError, match="top_k: expected at least 1, got 0"):
        detector.attention(image, top_k=0)


def test_image_of_one_pixel_gives_finite_boxes(checkpoint):
    [detection] = conddetr.Detector.from_checkpoint(checkpoint, device="cpu").predict(torch.rand(3, 1, 1), 0.0)
    assert torch.isfinite(detection.boxes).all()


def test_error_names_a_missing_image(checkpoint, tmp_path):
    detector = conddetr.Detector.from_checkpoint(checkpoint, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"none\.jpg does not exist"):
        detector.predict([tmp_path / "none.jpg"])


@pytest.mark.parametrize("dilation", [False, True])
def test_official_checkpoint_is_recognized(tmp_path, dilation):
    model = rule_model("conditional-detr-dc5-r50" if dilation else "conditional-detr-r50")
    path = tmp_path / "official.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(dilation=dilation)}, path)
    detector = conddetr.Detector.from_checkpoint(path, device="cpu")
    assert detector.model.config == conddetr.config.resolve(
        "conditional-detr-dc5-r50" if dilation else "conditional-detr-r50"
    )
    assert [detector.classes[label]["name"] for label in (1, 18, 90)] == ["person", "dog", "toothbrush"]
    images, _ = rule_inputs("p2")
    if dilation:
        with torch.inference_mode():
            out = detector.model(images)
        torch.testing.assert_close(out["pred_logits"], read_arrays("p2")["pred_logits"], atol=1e-4, rtol=0)


def test_foreign_checkpoints_and_wrong_class_lists_are_errors(tmp_path, tiny_model):
    torch.save({"model": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: the weights are neither Conditional DETR's nor DETR's"):
        conddetr.Detector.from_checkpoint(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="classes: expected 3 as the model has, got 2"):
        conddetr.Detector(tiny_model, CLASSES[:2])


def test_evaluation_without_known_data_is_an_error(tiny_model, small_coco):
    # These are the ids of the synthetic shapes, but COCO has them too.
    others = [{**category, "id": number} for number, category in enumerate(CLASSES, 1)]
    detector = conddetr.Detector(tiny_model, others, device="cpu")
    with pytest.raises(ValueError, match="its 3 classes, first 'dog', are not those of the synthetic shapes"):
        detector.evaluate(workers=0)
    detector = conddetr.Detector(tiny_model, CLASSES, device="cpu")
    detector.run = {"data": {"coco_path": str(small_coco.root)}}
    assert detector.evaluate(workers=0) == detector.evaluate(workers=0, coco_path=str(small_coco.root))


def test_train_evaluate_save_and_train_again(tmp_path):
    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
    data = {"train_images": 8, "val_images": 4}
    detector = conddetr.Detector("conditional-detr-tiny", device="cpu", **SMALL_MODEL)
    with pytest.raises(ValueError, match="no weights yet: train it"):
        detector.predict(torch.rand(3, 20, 20))
    with pytest.raises(ValueError, match=r"Unknown option 'epoch'\. Did you mean 'epochs'"):
        detector.train(epoch=3)
    metrics = detector.train(output_dir=str(tmp_path / "a"), epochs=1, **data)
    # By default, evaluation is on the validation images of its training.
    page = tmp_path / "quality.html"
    assert detector.evaluate(workers=0, report=page) == pytest.approx(metrics)
    assert "Quality of a detector" in page.read_text()
    with pytest.raises(ValueError, match=r"report .*a: expected a name ending in \.html"):
        detector.evaluate(workers=0, report=tmp_path / "a")
    assert detector.data.val_images == 4
    resumed = conddetr.Detector.from_checkpoint(tmp_path / "a" / "checkpoint.pt", device="cpu")
    assert resumed.data == detector.data
    with pytest.raises(ValueError, match=r"Unknown data option 'val_image'\. Did you mean 'val_images'"):
        detector.evaluate(val_image=2)
    assert [category["name"] for category in detector.classes] == ["disk", "square", "triangle"]
    again = conddetr.Detector.from_checkpoint(detector.save(tmp_path / "a.safetensors"), device="cpu")
    assert again.config == detector.config
    assert again.run == json.loads((tmp_path / "a" / "config.json").read_text())
    assert again.run["data"]["train_images"] == 8
    assert conddetr.Detector.from_checkpoint(again.save(tmp_path / "a.pt"), device="cpu").run == again.run
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), detector.model.parameters(), strict=True))
    # A trained detector starts from its weights, and a learning rate of 0 keeps them.
    weights = [parameter.clone() for parameter in again.model.parameters()]
    again.train(output_dir=str(tmp_path / "b"), epochs=1, lr=0.0, lr_backbone=0.0, **data)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), weights, strict=True))
    with pytest.raises(ValueError, match="expected a name ending in"):
        detector.save(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 1.0}, "batch_size: expected an int, got float 1.0"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
    ],
)
def test_loading_options_are_checked_before_the_data(options, message):
    model = conddetr.build("conditional-detr-tiny", num_classes=1)
    detector = conddetr.Detector(model, [{"id": 1, "name": "cat"}], "cpu")
    with pytest.raises(ValueError, match=message):
        detector.evaluate(coco_path="/nowhere", **options)


@pytest.mark.parametrize(
    "options", [{"threshold": -0.1}, {"threshold": 1.1}, {"threshold": float("nan")}, {"top_k": 0}, {"top_k": -1}]
)
def test_prediction_options_are_checked(options):
    model = conddetr.build("conditional-detr-tiny", num_classes=1)
    detector = conddetr.Detector(model, [{"id": 1, "name": "cat"}], "cpu")
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}: expected"):
        detector.predict("/nowhere.png", **options)
