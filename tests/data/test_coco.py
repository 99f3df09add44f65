"""COCO's layout: category ids, boxes, and all kinds of invalid annotations."""

import json
import logging
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from conddetr.config import resolve
from conddetr.data.coco import coco_split, folder_sets, layout_sets, layout_split
from conddetr.data.images import read_reduced
from conddetr.data.layouts import find_layout
from conddetr.data.loader import make_loader
from conddetr.data.transforms import EvalTransform, TrainTransform

TRANSFORM = EvalTransform(resolve("conditional-detr-tiny"))


def load(small_coco):
    small_coco.write()
    return coco_split(small_coco.root, "train", TRANSFORM)


def test_categories_are_remapped_in_the_order_of_their_ids(small_coco):
    small_coco.annotate(100, [5, 5, 10, 10], 90)
    small_coco.annotate(100, [5, 5, 10, 10], 7)
    dataset = load(small_coco)
    assert dataset.classes == [
        {"id": 3, "name": "dog"},
        {"id": 7, "name": "cat"},
        {"id": 90, "name": "toothbrush"},
    ]
    assert dataset[0][1]["labels"].tolist() == [0, 2, 1]


def test_boxes_are_normalised(small_coco):
    _, target = load(small_coco)[0]
    torch.testing.assert_close(target["boxes"], torch.tensor([[25 / 90, 25 / 60, 30 / 90, 40 / 60]]))
    assert (target["image_id"], target["original_size"]) == (100, (60, 90))


def test_boxes_are_clipped_dropped_and_counted(small_coco, caplog):
    small_coco.annotate(101, [-20, -10, 60, 30], 7)  # exceeds the image: clipped
    small_coco.annotate(101, [10, 10, 0, 5], 7)  # no width
    small_coco.annotate(101, [500, 10, 20, 20], 7)  # outside
    small_coco.annotate(101, [10, 10, -5, 5], 7)  # negative width
    small_coco.annotate(101, [1, 1, 50, 50], 7, iscrowd=1)  # a crowd is not a target
    with caplog.at_level(logging.WARNING):
        dataset = load(small_coco)
    assert dataset.dropped_boxes == 3
    assert "3 boxes without area inside their image are left out" in caplog.text
    boxes = dataset[1][1]["boxes"]
    torch.testing.assert_close(boxes[1], torch.tensor([20 / 90, 10 / 70, 40 / 90, 20 / 70]))
    assert len(boxes) == 2


@pytest.mark.parametrize("transform", [TrainTransform, EvalTransform])
def test_boxes_that_are_not_in_pixels_are_reported_first(small_coco, caplog, transform):
    small_coco.annotate(100, [0.1, 0.1, 0.4, 0.6], 7)
    small_coco.write()
    coco_split(small_coco.root, "train", transform(resolve("conditional-detr-tiny")))
    assert len(caplog.messages) == 1
    assert "1 boxes look like fractions. Boxes must be x, y, width, height in pixels" in caplog.text
    assert str(small_coco.file) in caplog.text


def test_images_without_boxes_are_used(small_coco):
    small_coco.content["annotations"] = []
    batch = next(iter(make_loader(load(small_coco), 4, train=False)))
    assert batch.images.shape == (4, 3, 128, 192)
    assert batch.valid_hw.tolist() == [[128, 192], [128, 165], [128, 144], [128, 128]]
    assert all(target["boxes"].shape == (0, 4) for target in batch.targets)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=5), "annotation id 1 has category_id 5, which is not in"),
        (lambda c: c["annotations"][0].update(image_id=9), "annotation id 1 has image_id 9, which is not in 'images'"),
        (
            lambda c: c["annotations"][1].update(bbox=[1, 2, float("nan"), 4]),
            r"\[1\] \(id 2\): bbox: expected",
        ),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"bbox: expected 4 finite numbers, got \[1, 2, 3\]"),
        (lambda c: c["annotations"][1].update(bbox="all"), "bbox: expected 4 finite numbers, got 'all'"),
        (lambda c: c["annotations"][2].pop("bbox"), r"annotations\[2\] \(id 3\): has no 'bbox'"),
        (lambda c: c["annotations"][2].update(id=1), "id 1 occurs more than once in 'annotations'"),
        (lambda c: c["images"][3].update(height=-7), r"images\[3\] \(id 103\): height: expected a positive integer"),
        (lambda c: c["images"][1].update(id="x"), r"images\[1\] \(id x\): id: expected an integer ≥ 0, got 'x'"),
        (lambda c: c["annotations"][0].update(iscrowd=[]), "iscrowd: expected 0 or 1"),
        (lambda c: c.pop("categories"), "expected a list under the key 'categories'"),
    ],
)
def test_invalid_annotations_are_named(small_coco, spoil, message):
    spoil(small_coco.content)
    with pytest.raises(ValueError, match=message) as caught:
        load(small_coco)
    assert str(small_coco.file) in str(caught.value)


def test_missing_and_invalid_files_are_named(small_coco, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Image folder .* does not exist"):
        coco_split(tmp_path / "nowhere", "train", TRANSFORM)
    small_coco.file.write_text('{"images": [')
    with pytest.raises(ValueError, match=r"instances_train2017\.json is not JSON"):
        coco_split(small_coco.root, "train", TRANSFORM)
    small_coco.file.unlink()
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json does not exist"):
        coco_split(small_coco.root, "train", TRANSFORM)


def test_damaged_images_are_named_with_their_id(small_coco):
    dataset = load(small_coco)
    file = small_coco.images / "2.jpg"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"2\.jpg.*Its image id is 102 in"):
        dataset[2]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.jpg does not exist.*image id is 102"):
        dataset[2]


def test_wrong_size_in_the_annotations_is_named(small_coco):
    small_coco.content["images"][0]["width"] = 91
    with pytest.raises(ValueError, match=r"0\.jpg: .*60×91.*60×90.*image id is 100 in"):
        load(small_coco)[0]


def test_a_folder_with_one_annotation_file_is_divided(small_coco):
    training = TrainTransform(resolve("conditional-detr-tiny"))
    sources = (small_coco.images, small_coco.file)
    train, val = folder_sets(*sources, training, TRANSFORM, val_fraction=0.3)
    assert (len(train), len(val)) == (3, 1)
    assert sorted(train.image_ids + val.image_ids) == [100, 101, 102, 103]
    assert folder_sets(*sources, training, TRANSFORM, val_fraction=0.3)[1].image_ids == val.image_ids
    truth = val.ground_truth()
    assert [image["id"] for image in truth["images"]] == val.image_ids
    assert [annotation["image_id"] for annotation in truth["annotations"]] == val.image_ids
    assert len(train[0][1]["labels"]) <= 1
    val_file = small_coco.root / "annotations" / "instances_val2017.json"
    train, val = folder_sets(
        *sources, training, TRANSFORM, val_images=small_coco.root / "val2017", val_annotations=val_file
    )
    assert (len(train), len(val)) == (4, 2)
    with pytest.raises(ValueError, match=r"val_fraction: expected a value between 0 and 1, got 1\.5"):
        folder_sets(*sources, training, TRANSFORM, val_fraction=1.5)


def test_reduced_decoding_keeps_boxes_on_their_objects(small_coco):
    pixels = np.zeros((1200, 1600, 3), np.uint8)
    pixels[300:700, 240:800] = 255
    exif = Image.Exif()
    for orientation in (1, 6):
        exif[0x0112] = orientation
        # Tag 6: stored turned by 90° counter-clockwise, turned back for display.
        stored = np.rot90(pixels, k=1) if orientation == 6 else pixels
        Image.fromarray(np.ascontiguousarray(stored)).save(small_coco.images / f"big{orientation}.jpg", exif=exif)
        small_coco.content["images"].append(
            {"id": 200 + orientation, "file_name": f"big{orientation}.jpg", "height": 1200, "width": 1600}
        )
        small_coco.annotate(200 + orientation, [240, 300, 560, 400], 3)
    small_coco.write()
    dataset = coco_split(
        small_coco.root, "train", EvalTransform(resolve("conditional-detr-tiny"), reduced_decoding=True)
    )
    for index in (4, 5):
        decoded, size = read_reduced(dataset.path(index), 128, 171)
        assert (tuple(decoded.shape), size) == ((3, 300, 400), (1200, 1600))
        image, target = dataset.load(index, dataset.plan(index, Random(0)))
        white = image.float().mean(0) > 127
        rows, columns = white.any(1).nonzero().flatten(), white.any(0).nonzero().flatten()
        cx, cy, w, h = (target["boxes"][0] * torch.tensor([171, 128, 171, 128])).tolist()
        white_box = (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)
        assert white_box == pytest.approx((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), abs=1)


def test_missing_sizes_are_read_from_the_images(small_coco, caplog):
    small_coco.content["images"][0] |= {"height": -1, "width": -1}
    small_coco.content["images"][1] |= {"height": None, "width": None}
    del small_coco.content["images"][2]["width"]
    dataset = load(small_coco)
    assert [dataset[index][1]["original_size"] for index in range(4)] == [(60, 90), (70, 90), (80, 90), (90, 90)]
    assert "3 of 4 images have no height and width: the sizes are read from the images" in caplog.text
    assert [image["height"] for image in dataset.ground_truth()["images"]] == [60, 70, 80, 90]


def turned(small_coco, orientation, suffix="png"):
    """Store a turned image as the only one; upright it has 60×90 pixels and a white object in the top left corner."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[5:25, 10:40] = 255
    # The tag describes how to turn the stored pixels back.
    stored = {1: pixels, 3: np.rot90(pixels, 2), 6: np.rot90(pixels), 8: np.rot90(pixels, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": exif} if suffix == "tif" else {"exif": exif}
    Image.fromarray(np.ascontiguousarray(stored)).save(small_coco.images / f"turned.{suffix}", **options)
    size = {"height": 60, "width": 90}
    small_coco.content["images"] = [{"id": 1, "file_name": f"turned.{suffix}", **size}]
    small_coco.content["annotations"] = []
    small_coco.annotate(1, [10, 5, 30, 20], 3)
    return stored.shape[:2]


def brightness(small_coco, reduced_decoding=False):
    """Mean of the pixels under the first box, and the size of the model's input."""
    small_coco.write()
    transform = EvalTransform(resolve("conditional-detr-tiny"), reduced_decoding)
    dataset = coco_split(small_coco.root, "train", transform)
    image, target = dataset.load(0, dataset.plan(0, Random(0)))
    height, width = image.shape[1:]
    cx, cy, w, h = (target["boxes"][0] * torch.tensor([width, height, width, height])).round().int().tolist()
    return image[:, cy - h // 2 + 2 : cy + h // 2 - 2, cx - w // 2 + 2 : cx + w // 2 - 2].float().mean(), (
        height,
        width,
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_boxes_refer_to_the_upright_image(small_coco, orientation, suffix):
    turned(small_coco, orientation, suffix)
    mean, (height, width) = brightness(small_coco)
    assert mean > 250
    assert height < width


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("reduced_decoding", [False, True])
def test_annotations_of_the_stored_image_are_used_if_only_they_fit(small_coco, suffix, reduced_decoding):
    height, width = turned(small_coco, 6, suffix)
    assert (height, width) == (90, 60)
    small_coco.content["images"][0] |= {"height": height, "width": width}
    # In the stored image, turned counter-clockwise, the object lies at the left, below the middle. The box does not fit
    # into the upright image, which is 90 wide and 60 high.
    small_coco.content["annotations"][0]["bbox"] = [5, 50, 20, 30]
    mean, (rows, columns) = brightness(small_coco, reduced_decoding)
    assert mean > 250
    assert rows > columns
    # Without boxes nothing can be misplaced.
    small_coco.content["annotations"] = []
    assert load(small_coco)[0][1]["original_size"] == (90, 60)


@pytest.mark.parametrize(
    ("box", "fits"),
    [([5, 20, 20, 30], "fit both ways"), ([50, 5, 30, 20], "fit only upright"), ([50, 50, 30, 20], "fit neither way")],
)
def test_stored_sizes_are_refused_if_boxes_may_be_upright(small_coco, box, fits):
    turned(small_coco, 6)
    small_coco.content["images"][0] |= {"height": 90, "width": 60}
    small_coco.content["annotations"][0]["bbox"] = box
    dataset = load(small_coco)
    with pytest.raises(ValueError, match=rf"turned\.png: .*90×60.*60×90.*the boxes {fits}.*image id is 1 in"):
        dataset[0]


def test_names_from_other_systems_are_resolved_before_training(small_coco):
    small_coco.content["images"][0]["file_name"] = "..\\Train2017\\0.JPG"
    assert load(small_coco)[0][1]["image_id"] == 100
    small_coco.content["images"][0]["file_name"] = "images\\0.jpg"
    with pytest.raises(FileNotFoundError, match=r"has backslashes.*Its image id is 100 in"):
        load(small_coco)


def test_objects_crowds_and_dropped_boxes_are_counted(small_coco):
    small_coco.annotate(101, [1, 1, 50, 50], 7, iscrowd=1)
    small_coco.annotate(101, [500, 10, 20, 20], 7)
    dataset = load(small_coco)
    assert (dataset.objects, dataset.crowds, dataset.dropped_boxes) == (4, 1, 1)
    assert dataset.describe() == (
        f"{small_coco.file}: 4 images, 4 objects of 3 classes, 1 crowds, which are not trained on, 1 boxes left out"
    )


def test_the_layout_of_another_folder_is_named(small_coco, tmp_path):
    other = tmp_path / "roboflow"
    (other / "train").mkdir(parents=True)
    (other / "train" / "_annotations.coco.json").write_text(json.dumps(small_coco.content))
    with pytest.raises(
        ValueError, match=r"expected train2017/ and annotations/.*Roboflow COCO \(train/_ann.*--dataset"
    ):
        coco_split(other, "train", TRANSFORM)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no known layout.*It has no files"):
        coco_split(tmp_path / "empty", "train", TRANSFORM)


def test_a_layout_without_validation_images_is_divided(small_coco, tmp_path):
    other = tmp_path / "roboflow"
    other.mkdir()
    small_coco.images.rename(other / "train")
    (other / "train" / "_annotations.coco.json").write_text(json.dumps(small_coco.content))
    layout = find_layout(other)
    train, val = (layout_split(layout, split, TRANSFORM, 0.3) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 1)
    assert sorted(train.image_ids + val.image_ids) == [100, 101, 102, 103]
    assert val.source.startswith("1 of the 4 images of ")
    both = layout_sets(layout, TrainTransform(resolve("conditional-detr-tiny")), TRANSFORM, 0.3)
    assert [part.image_ids for part in both] == [train.image_ids, val.image_ids]
    with pytest.raises(ValueError, match="has no images for test"):
        layout_split(layout, "test", TRANSFORM, 0.3)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_images_have_their_annotations(coco_path, split):
    dataset = coco_split(coco_path, split, TRANSFORM)
    content = json.loads((coco_path / "annotations" / f"instances_{split}2017.json").read_text())
    assert len(dataset) == len(content["images"])
    assert len(dataset.classes) == 80
    names = {category["id"]: category["name"] for category in content["categories"]}
    for index in range(0, len(dataset), 8):
        image, target = dataset[index]
        truth = [a for a in content["annotations"] if a["image_id"] == target["image_id"] and not a["iscrowd"]]
        height, width = target["original_size"]
        scale = torch.tensor([width, height, width, height])
        for annotation, label, box in zip(truth, target["labels"], target["boxes"] * scale, strict=True):
            assert dataset.classes[label]["name"] == names[annotation["category_id"]]
            x, y, w, h = annotation["bbox"]
            torch.testing.assert_close(box, torch.tensor([x + w / 2, y + h / 2, w, h]), atol=1e-2, rtol=0)
        assert image.shape[0] == 3
        assert torch.isfinite(image).all()
