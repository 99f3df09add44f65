"""Each part of the augmentation: boxes stay on their objects, ranges are reached, and nothing else happens."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2

from conddetr.config import resolve
from conddetr.config.augment import AugmentConfig
from conddetr.data.augment.colour import BRIGHTNESS, CONTRAST, HUE, SATURATION, Colour, apply_colour, plan_colour
from conddetr.data.augment.crops import LEAST_LONG_SIDE, plan_crop
from conddetr.data.augment.plans import Crop, Mosaic, Plan
from conddetr.data.coco import coco_split
from conddetr.data.images import read_reduced
from conddetr.data.loader import make_loader
from conddetr.data.transforms import EvalTransform, TrainTransform, apply

TINY, LARGE = resolve("conditional-detr-tiny"), resolve("conditional-detr-r50")
AUGMENTATIONS = {
    "none": AugmentConfig("none"),
    "paper": AugmentConfig("paper"),
    "strong": AugmentConfig("strong"),
    "flip": AugmentConfig("none", flip=True),
    "multi-scale": AugmentConfig("none", resize="multi-scale"),
    "large-scale-jitter": AugmentConfig("none", resize="large-scale-jitter"),
    "random crop": AugmentConfig("none", crop="random"),
    "keep-boxes": AugmentConfig("none", crop="keep-boxes"),
    "colour": AugmentConfig("none", colour=True),
    "jittered random crop": AugmentConfig("paper", resize="large-scale-jitter"),
}
KEEPS_ALL = ("none", "flip", "multi-scale", "colour")
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
"""Of labels 0 to 3."""


def picture(height, width, boxes):
    """A black image with a rectangle in each label's colour."""
    image = np.zeros((height, width, 3), np.uint8)
    for (x0, y0, x1, y1), colour in zip(boxes, COLOURS, strict=False):
        image[y0:y1, x0:x1] = colour
    return image


def sample(height, width, boxes):
    """The picture as a data set reads it, and its target."""
    image = torch.from_numpy(picture(height, width, boxes)).permute(2, 0, 1)
    return image, {"labels": torch.arange(len(boxes)), "boxes": torch.tensor(boxes, dtype=torch.float32)}


def measured(image, label):
    """Tight xyxy bounding box, in pixels, of what has a label's colour, whatever its brightness."""
    red, green, blue = image.int()
    strength = (
        red - torch.maximum(green, blue),
        green - torch.maximum(red, blue),
        blue - torch.maximum(red, green),
        torch.minimum(torch.minimum(red, green), blue),
    )[label]
    mask = strength > 0.5 * strength.max()
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def assert_tight(image, target, tolerance=1.5):
    """Every box is the bounding box of its label's colour, within `tolerance` pixels on each side."""
    assert ((target["boxes"] >= 0) & (target["boxes"] < 1 + 1e-6)).all()
    height, width = image.shape[-2:]
    boxes = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
    assert len(boxes) == len(target["labels"])
    for box, label in zip(boxes, target["labels"].tolist(), strict=True):
        torch.testing.assert_close(box, measured(image, label).float(), atol=tolerance, rtol=0)


@st.composite
def layouts(draw):
    """Height and width of an image, and three boxes side by side, at least 8 pixels large and 3 apart."""
    height, width = draw(st.integers(30, 260)), draw(st.integers(45, 260))
    boxes = []
    for column in range(3):
        left, right = column * width // 3 + 3, (column + 1) * width // 3
        x0, y0 = draw(st.integers(left, right - 8)), draw(st.integers(0, height - 8))
        boxes.append((x0, y0, draw(st.integers(x0 + 8, right)), draw(st.integers(y0 + 8, height))))
    return height, width, boxes


@pytest.mark.parametrize("name", AUGMENTATIONS)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layout=layouts(), seed=st.integers(0, 2**32), size=st.sampled_from([64, 128, 300]))
def test_boxes_stay_tight_on_their_objects(name, layout, seed, size):
    height, width, boxes = layout
    config = resolve("conditional-detr-tiny", image_size=size, max_image_size=2 * size)
    transform = TrainTransform(config, AUGMENTATIONS[name])
    plan = transform.plan(height, width, Random(seed), np.array(boxes, float))
    image, target = apply(*sample(height, width, boxes), plan)
    assert image.shape == (3, plan.height, plan.width)
    short, long = transform.largest_shape()
    assert min(image.shape[1:]) <= short
    assert max(image.shape[1:]) <= long
    assert_tight(image, target)
    if name in KEEPS_ALL:
        assert target["labels"].tolist() == [0, 1, 2]
    if AUGMENTATIONS[name].crop == "keep-boxes" and min(image.shape[1:]) > 40:
        assert len(target["labels"]) >= 1


@pytest.mark.parametrize(
    ("size", "seed", "expected"),
    [
        ((480, 640), 0, Plan(False, None, 608, 811)),
        ((480, 640), 1, Plan(True, None, 736, 981)),
        ((640, 427), 2, Plan(False, None, 719, 480)),
        ((333, 500), 3, Plan(True, None, 608, 913)),
        ((500, 375), 4, Plan(True, Crop(667, 500, 100, 100, 417, 391), 785, 736)),
        ((1, 900), 5, Plan(False, None, 1, 1333)),
    ],
)
def test_the_paper_samples_as_ever(size, seed, expected):
    """Numbers of the first version; a change would give resumed and repeated runs other images."""
    assert TrainTransform(LARGE).plan(*size, Random(seed)) == expected


def test_none_is_the_resize_of_evaluation():
    image, target = sample(100, 160, [(10, 20, 50, 60)])
    expected, expected_target = EvalTransform(TINY)(image, target)
    result, result_target = TrainTransform(TINY, "none")(image, target, Random(0))
    assert torch.equal(result, expected)
    assert torch.equal(result_target["boxes"], expected_target["boxes"])


@pytest.mark.parametrize("name", ["paper", "strong"])
def test_flips_are_half_of_all_or_none(name):
    boxes = np.array([[10.0, 10.0, 40.0, 40.0]])

    def flips(augment):
        transform = TrainTransform(LARGE, augment)
        return sum(transform.plan(300, 400, Random(seed), boxes).flip for seed in range(400))

    assert 150 < flips(AugmentConfig(name)) < 250
    assert flips(AugmentConfig(name, flip=False)) == 0


def test_without_flip_left_stays_left():
    layout = 120, 200, [(10, 40, 60, 80), (140, 40, 190, 80)]
    for seed in range(30):
        image, target = TrainTransform(TINY, AugmentConfig("strong", flip=False))(*sample(*layout), Random(seed))
        if len(target["labels"]) == 2:
            assert measured(image, 0)[2] <= measured(image, 1)[0]


def test_large_scale_jitter_reaches_its_whole_range():
    transform = TrainTransform(LARGE, AugmentConfig("none", resize="large-scale-jitter"))
    plans = [transform.plan(480, 640, Random(seed)) for seed in range(3000)]
    # Scale 1 is the size of evaluation, 800 × 1067. A larger image is cut to it, so the cut shows the scale.
    scales = np.array([plan.height / 800 if plan.crop is None else 480 / plan.crop.rows for plan in plans])
    assert 0.099 < scales.min() < 0.11
    assert 1.99 < scales.max() < 2.01
    # Uniform: as many in each tenth of the range.
    counts = np.histogram(scales, np.linspace(0.1, 2.0, 11))[0]
    assert counts.min() > 230
    assert counts.max() < 370
    assert {(plan.height, plan.width) for plan in plans if plan.crop is not None} == {(800, 1067)}


def test_jitter_leaves_two_cells_of_a_feature_map():
    transform = TrainTransform(TINY, AugmentConfig("none", resize="large-scale-jitter"))
    sides = [max(plan.height, plan.width) for seed in range(300) for plan in [transform.plan(90, 90, Random(seed))]]
    assert min(sides) == LEAST_LONG_SIDE


def test_boxes_below_a_pixel_are_dropped_by_jitter_alone():
    image, target = sample(100, 100, [(10, 10, 16, 16), (40, 40, 90, 90)])
    small = Plan(False, None, 12, 12)
    assert apply(image, target, small)[1]["labels"].tolist() == [0, 1]
    assert apply(image, target, replace(small, least_side=1.0))[1]["labels"].tolist() == [1]
    jittered = TrainTransform(TINY, AugmentConfig("none", resize="large-scale-jitter")).plan(100, 100, Random(0))
    assert jittered.least_side == 1.0
    assert TrainTransform(TINY).plan(100, 100, Random(0)).least_side == 0.0


def test_crops_that_keep_boxes_are_sampled_like_torchvision():
    """The share of images that stay whole, and the mean area of the crops."""
    official, box = v2.RandomIoUCrop(), (40, 60, 160, 220)
    boxes = tv_tensors.BoundingBoxes([box], format="XYXY", canvas_size=(300, 400))
    image = tv_tensors.Image(torch.zeros(1, 300, 400, dtype=torch.uint8))
    expected = [official.make_params([image, boxes]) for _ in range(150)]
    crops = [plan_crop(300, 400, np.array([box], float), Random(seed)) for seed in range(2000)]
    whole = sum(not params for params in expected) / len(expected)
    assert sum(crop is None for crop in crops) / len(crops) == pytest.approx(whole, abs=0.1)
    area = np.mean([params["height"] * params["width"] for params in expected if params])
    assert np.mean([crop.rows * crop.columns for crop in crops if crop]) == pytest.approx(area, rel=0.12)


@pytest.mark.parametrize("resize", ["fixed", "large-scale-jitter"])
def test_crops_keep_exactly_the_objects_whose_centre_is_inside(resize):
    boxes = [(0, 0, 50, 40), (60, 50, 90, 120), (100, 10, 190, 30)]
    transform = TrainTransform(LARGE, AugmentConfig("none", resize=resize, crop="keep-boxes"))
    kept = set()
    for seed in range(150):
        plan = transform.plan(130, 200, Random(seed), np.array(boxes, float))
        crop = plan.crop or Crop(130, 200, 0, 0, 130, 200)
        rows, columns = range(crop.top, crop.top + crop.rows), range(crop.left, crop.left + crop.columns)
        inside = [n for n, (x0, y0, x1, y1) in enumerate(boxes) if (x0 + x1) // 2 in columns and (y0 + y1) // 2 in rows]
        assert inside
        assert apply(*sample(130, 200, boxes), replace(plan, height=130, width=200))[1]["labels"].tolist() == inside
        kept.add(tuple(inside))
    assert {(0,), (1,), (2,), (0, 1, 2)} <= kept


def test_without_objects_nothing_is_cropped_away():
    transform = TrainTransform(LARGE, "strong")
    assert all(plan_crop(300, 400, np.empty((0, 4)), Random(seed)) is None for seed in range(50))
    empty = {"labels": torch.empty(0), "boxes": torch.empty(0, 4)}
    assert len(transform(sample(60, 80, [])[0], empty, Random(1))[1]["boxes"]) == 0


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (2, 3)])
def test_extreme_shapes_give_valid_images_and_boxes(name, size):
    for seed in range(6):
        image, target = sample(*size, [(0, 0, 1, 1)])
        image, target = TrainTransform(TINY, AUGMENTATIONS[name])(image, target, Random(seed))
        assert min(image.shape) >= 1
        assert torch.isfinite(target["boxes"]).all()


@pytest.mark.parametrize("contrast_first", [False, True])
def test_colours_equal_torchvisions_tensor_kernels(contrast_first):
    image = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).permute(2, 0, 1)
    colour = Colour(1.1, 0.7, 1.3, 0.03, contrast_first)
    expected = v2.functional.adjust_brightness(image, 1.1)
    expected = v2.functional.adjust_contrast(expected, 0.7) if contrast_first else expected
    expected = v2.functional.adjust_hue(v2.functional.adjust_saturation(expected, 1.3), 0.03)
    expected = expected if contrast_first else v2.functional.adjust_contrast(expected, 0.7)
    result = apply_colour(image, colour)
    # PIL's hue has 256 steps; torchvision computes in float.
    assert (result.int() - expected.int()).abs().float().mean() < 2
    assert result.stride(0) == 1


def test_colours_keep_to_their_ranges():
    colours = [plan_colour(Random(seed)) for seed in range(1000)]
    limits = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
    for name, (low, high) in limits.items():
        values = np.array([getattr(colour, name) for colour in colours])
        changed = values[values != (0.0 if name == "hue" else 1.0)]
        assert 400 < len(changed) < 600
        assert low <= changed.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < changed.max() <= high


@pytest.fixture
def coloured(small_coco):
    """Eight training images of four sizes, each with one box in the colour of its label, 0 to 2, or white."""
    small_coco.content.update(images=[], annotations=[])
    small_coco.content["categories"] = [{"id": label, "name": f"colour {label}"} for label in range(4)]
    rng = np.random.default_rng(2)
    for index in range(8):
        height, width = (60, 90) if index % 2 else (90, 70)
        label, (x, y) = index % 4, rng.integers(15, 30, 2).tolist()
        boxes = [(0, 0, 0, 0)] * label + [(x, y, x + 30, y + 25)]
        Image.fromarray(picture(height, width, boxes)).save(small_coco.images / f"{index}.png")
        entry = {"id": index, "file_name": f"{index}.png", "height": height, "width": width}
        small_coco.content["images"].append(entry)
        small_coco.annotate(index, [x, y, 30, 25], label)
    small_coco.write()
    return small_coco


def test_a_mosaic_has_the_boxes_of_four_images(coloured):
    dataset = coco_split(coloured.root, "train", TrainTransform(TINY, AugmentConfig(mosaic=1.0)))
    tried, numbers = 0, set()
    for seed in range(60):
        index = seed % 8
        plan = dataset.plan(index, Random(seed))
        assert isinstance(plan, Mosaic)
        assert plan.indices[0] == index
        image, target = dataset.load(index, plan)
        assert image.shape == (3, plan.height, plan.width)
        assert target["image_id"] == index
        numbers.add(len(target["boxes"]))
        # Two boxes of one colour cannot be measured.
        if len(set(target["labels"].tolist())) == len(target["labels"]):
            assert_tight(image, target)
            tried += 1
        assert set(target["labels"].tolist()) <= {source % 4 for source in plan.indices}
    assert tried >= 5
    assert max(numbers) == 4


def test_a_mosaic_has_the_probability_that_is_given(coloured):
    dataset = coco_split(coloured.root, "train", TrainTransform(TINY, AugmentConfig("strong", mosaic=0.25)))
    plans = [dataset.plan(0, Random(seed)) for seed in range(800)]
    mosaics = [plan for plan in plans if isinstance(plan, Mosaic)]
    assert 150 < len(mosaics) < 250
    assert {source for plan in mosaics for source in plan.indices} == set(range(8))
    assert any(plan.colour for plan in mosaics)


@pytest.mark.parametrize("pad_buckets", [0, 3])
def test_strong_batches_do_not_depend_on_workers_or_on_resuming(coloured, pad_buckets):
    dataset = coco_split(coloured.root, "train", TrainTransform(TINY, AugmentConfig("strong", mosaic=0.5)))

    def batches(workers=0, start=0):
        loader = make_loader(dataset, 2, train=True, seed=3, workers=workers, pad_buckets=pad_buckets)
        loader.sampler.set_epoch(1, start)
        return list(loader)

    whole = batches()
    for other, expected in ((batches(workers=2), whole), (batches(start=2), whole[2:])):
        for first, second in zip(other, expected, strict=True):
            assert torch.equal(first.images, second.images)
            assert torch.equal(first.boxes, second.boxes)
            assert torch.equal(first.labels, second.labels)
    largest = make_loader(dataset, 2, train=True, pad_buckets=pad_buckets).sampler.largest_shape()
    assert all(batch.images.shape[2] <= largest[0] and batch.images.shape[3] <= largest[1] for batch in whole)


@pytest.mark.parametrize("name", ["strong", "keep-boxes"])
def test_boxes_stay_tight_on_jpegs_decoded_at_reduced_size(small_coco, name):
    boxes = [(200, 150, 700, 600), (900, 500, 1200, 1100), (1300, 100, 1500, 400)]
    small_coco.content.update(images=[], annotations=[])
    Image.fromarray(picture(1200, 1600, boxes)).save(small_coco.images / "large.jpg", quality=95)
    small_coco.content["images"].append({"id": 1, "file_name": "large.jpg", "height": 1200, "width": 1600})
    small_coco.content["categories"] = [{"id": label, "name": f"colour {label}"} for label in range(3)]
    for label, (x0, y0, x1, y1) in enumerate(boxes):
        small_coco.annotate(1, [x0, y0, x1 - x0, y1 - y0], label)
    small_coco.write()
    dataset = coco_split(small_coco.root, "train", TrainTransform(TINY, AUGMENTATIONS[name]))
    reduced = cropped = 0
    for seed in range(20):
        plan = dataset.plan(0, Random(seed))
        decoded, size = read_reduced(small_coco.images / "large.jpg", *plan.first_size())
        reduced += decoded.shape[1] < size[0]
        cropped += plan.crop is not None
        image, target = dataset.load(0, plan)
        assert_tight(image, target)
    assert reduced > 10
    assert cropped > 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AugmentConfig("papr"), "Augmentation option augment: unknown value 'papr'. Did you mean 'paper'"),
        (lambda: AugmentConfig(["strong"]), "Augmentation option augment: expected str, got list"),
        (lambda: AugmentConfig(flop=True), "Unknown augmentation option 'flop'. Did you mean 'flip'"),
        (lambda: AugmentConfig(flip="yes"), "Augmentation option flip: expected bool, got str 'yes'"),
        (lambda: AugmentConfig(resize="large"), "Augmentation option resize: unknown value 'large'"),
        (lambda: AugmentConfig(mosaic=1.5), "Augmentation option mosaic: expected a number from 0 to 1, got 1.5"),
        (lambda: AugmentConfig(mosaic=float("nan")), "Augmentation option mosaic: expected a number from 0 to 1"),
        (lambda: TrainTransform(TINY, "strong").plan(90, 90, Random(0)), "boxes: crops that keep boxes need them"),
        (
            lambda: TrainTransform(TINY, AugmentConfig(mosaic=0.5))(*sample(9, 9, [(0, 0, 8, 8)]), Random(0)),
            "A mosaic needs other images of a data set",
        ),
    ],
)
def test_wrong_use_is_a_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
