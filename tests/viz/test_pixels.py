"""Boxes and captions on photos and frames of a video."""

import numpy as np
import torch
from matplotlib import colormaps

from conddetr.viz.pixels import LEAST_SIDE, drawn_frame, drawn_photo

IMAGE = torch.full((3, 240, 320), 100, dtype=torch.uint8)
ORANGE = [round(255 * part) for part in colormaps["tab10"](1)[:3]]


def test_a_box_is_drawn_at_its_pixels():
    before = IMAGE.clone()
    pixels = drawn_frame(IMAGE, torch.tensor([[40.0, 100.0, 200.0, 220.0]]), [11], ["cat 0.51"])
    assert pixels.shape == (240, 320, 3)
    assert torch.equal(IMAGE, before)
    is_line = (pixels == ORANGE).all(-1)
    assert is_line[100:220, 40].all()
    assert is_line[220, 40:200].all()
    changed = (pixels != 100).any(-1)
    assert not changed[103:217, 43:197].any()
    assert not changed[:, :39].any()
    # The caption is above the box, white on the box's colour.
    assert (pixels[80:100] > 240).all(-1).any()


def test_a_small_photo_is_enlarged_with_its_boxes():
    box = torch.tensor([[40.0, 100.0, 200.0, 220.0]])
    pixels = drawn_photo(IMAGE, box, [11], ["cat 0.51"])
    assert pixels.shape == (360, LEAST_SIDE, 3)
    is_line = (pixels == ORANGE).all(-1)
    assert is_line[150:330, 60].all()
    assert is_line[330, 60:300].all()
    assert (pixels[200, 150] == 100).all()
    # A floating image has the same pixels.
    assert np.array_equal(drawn_photo(IMAGE / 255, box, [11], ["cat 0.51"]), pixels)
    large = torch.zeros(3, 500, 20, dtype=torch.uint8)
    assert drawn_photo(large, box[:0], [], []).shape == (500, 20, 3)
    assert drawn_photo(large[:, :1, :1], box[:0], [], []).shape == (LEAST_SIDE, LEAST_SIDE, 3)


def test_a_caption_without_room_above_is_inside_the_frame():
    for box in ([-20.0, -30.0, 100.0, 200.0], [5.0, 2.0, 100.0, 200.0]):
        pixels = drawn_frame(IMAGE, torch.tensor([box]), [1], ["cat 0.51"])
        assert (pixels[:20] > 240).all(-1).sum() > 10


def test_captions_differ_in_every_script():
    boxes = torch.tensor([[40.0, 100.0, 200.0, 220.0]])
    first, second, plain = (drawn_frame(IMAGE, boxes, [1], [text]) for text in ("Ёлка", "café", ""))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, plain)


def test_a_caption_is_one_line():
    """A class name may have line breaks."""
    boxes = torch.tensor([[40.0, 100.0, 200.0, 220.0]])
    broken, plain = (drawn_frame(IMAGE, boxes, [1], [text]) for text in ("traffic\nlight\r\n", "traffic light"))
    assert np.array_equal(broken, plain)


def test_corners_in_the_wrong_order_are_drawn_too():
    """Boxes of an untrained model may be empty."""
    pixels = drawn_frame(IMAGE, torch.tensor([[50.0, 50.0, 50.0, 49.9]]), [1], ["x"])
    assert (pixels[50, 50] == ORANGE).all()


def test_a_caption_over_another_has_an_edge():
    """Without it, the last digit of the lower one would seem to belong to the number of the upper one."""
    image = torch.zeros(3, 200, 300, dtype=torch.uint8)
    boxes = torch.tensor([[40.0, 60.0, 250.0, 150.0], [33.0, 60.0, 250.0, 150.0]])
    above = slice(45, 58)
    alone = drawn_frame(image, boxes[1:], [2], ["dog 0.42"])[above]
    both = drawn_frame(image, boxes, [2, 2], ["dog 0.44", "dog 0.42"])[above]
    end = alone.any(axis=(0, 2)).nonzero()[0].max()
    assert both[:, end + 1].any()
    assert (both[:, end] == 255).all()
