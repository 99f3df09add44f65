"""The figure shows the same object for all detectors."""

import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import conddetr
from paper import figure1

CLASSES = [{"id": index, "name": str(index)} for index in range(3)]


@pytest.fixture
def detectors():
    presets = ("conditional-detr-tiny", "detr-tiny")
    return [conddetr.Detector(conddetr.build(preset, num_classes=3), CLASSES) for preset in presets]


def test_every_row_shows_the_same_object(detectors):
    image = torch.rand(3, 90, 120)
    shown = figure1.same_object(detectors, image, top=2, layer=0)
    assert shown[0][1] == 1
    reference = shown[0][0].boxes[1]
    detections, index, maps = shown[1]
    assert len(detections.boxes) == 25
    assert box_iou(reference[None], detections.boxes)[0, index] == box_iou(reference[None], detections.boxes).max()
    assert maps.layer == 0
    figure = figure1.draw(image, ["one", "other"], shown, "spatial")
    assert len(figure.axes) == 2 * (1 + 4)
    assert figure.axes[0].get_title() == "one"


def test_titles_are_unique():
    assert figure1.titles_of(["runs/a.pt", "runs/b.pt"]) == ["a", "b"]
    assert figure1.titles_of(["runs/detr/best.pt", "runs/conditional/best.pt"]) == ["detr/best", "conditional/best"]


def test_main_draws_detectors_with_different_heads(tmp_path, monkeypatch):
    files = []
    for preset, heads in (("conditional-detr-tiny", 4), ("detr-tiny", 2)):
        (tmp_path / preset).mkdir()
        detector = conddetr.Detector(conddetr.build(preset, num_classes=3, num_heads=heads), CLASSES)
        files.append(str(detector.save(tmp_path / preset / "best.pt")))
    pixels = torch.randint(256, (90, 120, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    out = tmp_path / "figure.png"
    words = [str(tmp_path / "photo.png"), *files, "--out", str(out)]
    figure1.main(words)
    assert out.read_bytes().startswith(b"\x89PNG")
