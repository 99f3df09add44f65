"""The figure compares the same object in all detectors."""

import figure1
import pytest
import torch
from torchvision.ops import box_iou

import conddetr

CLASSES = [{"id": index, "name": str(index)} for index in range(3)]


@pytest.fixture
def detectors():
    presets = ("conditional-detr-tiny", "detr-tiny")
    return [conddetr.Detector(conddetr.build(preset, num_classes=3), CLASSES) for preset in presets]


def test_every_row_shows_the_same_object(detectors):
    image = torch.rand(3, 90, 120)
    shown = figure1.same_object(detectors, image, top=2, layer=0)
    assert shown[0][1] == 1
    wanted = shown[0][0].boxes[1]
    found, index, maps = shown[1]
    assert len(found.boxes) == 25
    assert box_iou(wanted[None], found.boxes)[0, index] == box_iou(wanted[None], found.boxes).max()
    assert maps.layer == 0
    figure = figure1.draw(image, ["one", "other"], shown, "spatial")
    assert len(figure.axes) == 2 * (1 + 4)
    assert figure.axes[0].get_title() == "one"
