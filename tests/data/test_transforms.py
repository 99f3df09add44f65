"""Augmentation keeps boxes on their objects."""

from random import Random

import pytest
import torch

from conddetr.config import resolve
from conddetr.data.transforms import EvalTransform, TrainTransform, apply

CONFIG = resolve("conditional-detr-tiny")


def marked(height, width, box):
    """A black image with a white rectangle, and its box."""
    x0, y0, x1, y1 = box
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, y0:y1, x0:x1] = 255
    return image, {"labels": torch.tensor([1]), "boxes": torch.tensor([box], dtype=torch.float32)}


def white_box(image):
    """Bounding box, cxcywh in [0, 1], of all pixels that are at least half white."""
    mask = image.float().mean(0) > 127.5
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = mask.shape
    return torch.stack([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height])


@pytest.mark.parametrize("seed", range(40))
def test_boxes_stay_on_their_objects(seed):
    image, target = marked(120, 200, (30, 20, 110, 90))
    image, target = TrainTransform(CONFIG)(image, target, Random(seed))
    if len(target["boxes"]) == 0:
        assert (image.float().mean(0) > 127.5).float().mean() < 0.01
        return
    # Within one pixel of the resized image on every side.
    tolerance = 1.5 / min(image.shape[-2:])
    torch.testing.assert_close(target["boxes"][0], white_box(image), atol=tolerance, rtol=0)
    assert max(image.shape[-2:]) <= CONFIG.max_image_size


def test_evaluation_is_not_random():
    image, target = marked(100, 160, (10, 20, 50, 60))
    first, second = (EvalTransform(CONFIG)(image, target) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[0].shape == (3, 128, 205)
    torch.testing.assert_close(first[1]["boxes"][0], torch.tensor([30 / 160, 40 / 100, 40 / 160, 40 / 100]))


def test_colours_stay_interleaved():
    """`collate` copies planar images three times as slowly."""
    image, target = marked(120, 200, (30, 20, 110, 90))
    image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    transform = TrainTransform(CONFIG)
    variants = set()
    for seed in range(20):
        plan = transform.plan(120, 200, Random(seed))
        variants.add((plan.flip, plan.crop is not None))
        assert apply(image, target, plan)[0].stride(0) == 1
    assert len(variants) == 4


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (2, 3)])
def test_extreme_shapes_give_valid_images_and_boxes(size):
    for seed in range(6):
        image, target = marked(*size, (0, 0, 1, 1))
        image, target = TrainTransform(CONFIG)(image, target, Random(seed))
        assert min(image.shape) >= 1
        assert torch.isfinite(target["boxes"]).all()


def test_large_presets_have_the_official_scales():
    transform = TrainTransform(resolve("conditional-detr-r50"))
    assert transform.scales == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert (transform.crop_scales, transform.crop_range) == ([400, 500, 600], [384, 600])
    assert transform.max_size == 1333
