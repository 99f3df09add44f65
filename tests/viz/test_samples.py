"""Training images are drawn as training sees them, and nothing is overwritten."""

import re

import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert

from conddetr.cli import main
from conddetr.config import resolve
from conddetr.config.augment import AugmentConfig
from conddetr.data.coco import coco_split
from conddetr.data.loader import make_loader
from conddetr.data.synthetic import SyntheticShapes
from conddetr.data.transforms import TrainTransform
from conddetr.viz.boxes import denormalize
from conddetr.viz.samples import draw_samples, sample_figure, samples

TINY = resolve("conditional-detr-tiny")


@pytest.mark.parametrize("augment", ["paper", AugmentConfig("strong", mosaic=0.5)])
def test_versions_are_what_the_loader_of_a_training_returns(small_coco, augment):
    dataset = coco_split(small_coco.root, "train", TrainTransform(TINY, augment))
    shown = {sample.index: sample for sample in samples(dataset, count=4, versions=2, seed=9)}
    loader = make_loader(dataset, 1, train=True, seed=9)
    seen = 0
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            version = shown[dataset.image_ids.index(batch.image_ids[0])].versions[epoch]
            torch.testing.assert_close(version.image, denormalize(batch.model_input()[0]), atol=1e-6, rtol=0)
            height, width = version.image.shape[1:]
            expected = box_convert(batch.boxes, "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
            torch.testing.assert_close(version.boxes, expected)
            assert version.labels == batch.labels.tolist()
            seen += 1
    assert seen == 8
    assert shown[1].original.image.shape == (3, 70, 90)
    torch.testing.assert_close(shown[1].original.boxes, torch.tensor([[10.0, 5.0, 40.0, 45.0]]))


def test_titles_have_sizes_and_captions_have_names(small_coco):
    dataset = coco_split(small_coco.root, "train", TrainTransform(TINY, AugmentConfig("none")))
    [sample] = samples(dataset, count=1, versions=3)
    figure = sample_figure(sample, [category["name"] for category in dataset.classes])
    height = 60 + 10 * sample.index
    assert figure.axes[0].get_title() == f"image: {height}×90"
    assert len(figure.axes) == 4
    assert re.fullmatch(r"epoch 1: \d+×\d+", figure.axes[1].get_title())
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["dog"] * 4


def test_dropped_boxes_are_counted(small_coco, tmp_path):
    for image_id in range(100, 104):
        small_coco.annotate(image_id, [80.0, 50.0, 0.4, 0.4], 7)
    small_coco.write()
    kept = coco_split(small_coco.root, "train", TrainTransform(TINY, AugmentConfig("none")))
    drawn = draw_samples(kept, tmp_path / "kept", count=2, versions=2)
    assert (drawn.objects, drawn.versions, drawn.version_objects, drawn.dropped) == (4, 4, 8, 0)
    # A box of 0.4 pixels has less than one at any scale of jitter up to 2 · 128 / 60.
    transform = TrainTransform(TINY, AugmentConfig("none", mosaic=1.0))
    drawn = draw_samples(coco_split(small_coco.root, "train", transform), tmp_path / "mosaic", count=1, versions=2)
    assert drawn.version_objects + drawn.dropped == 2 * 4 * 2
    assert drawn.dropped >= 2 * 4


def test_pictures_replace_only_earlier_ones_of_the_same_image(small_coco, capsys):
    """Into the folder of the images themselves."""
    before = {path: path.read_bytes() for path in small_coco.images.iterdir()}
    Image.new("RGB", (5, 5)).save(small_coco.images / "0.png")
    before[small_coco.images / "0.png"] = (small_coco.images / "0.png").read_bytes()
    command = ["show-data", "--coco-path", str(small_coco.root), "--preset", "conditional-detr-tiny"]
    command += ["--versions", "1", "--out", str(small_coco.images)]
    for count in ("9", "1"):
        assert main([*command, "--augment", "strong", "--no-flip", "--count", count]) == 0
    printed = capsys.readouterr().out
    assert "augment=strong  flip=False  resize=large-scale-jitter" in printed
    assert re.search(r"4 images with 4 objects, 4 augmented versions with \d objects, \d boxes dropped", printed)
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in small_coco.images.glob("*.png")} == {"0.png", "0-2.png", "1.png", "2.png", "3.png"}


def test_synthetic_shapes_have_no_versions(tmp_path, capsys):
    assert main(["show-data", "--count", "2", "--out", str(tmp_path)]) == 0
    assert "2 images with " in (printed := capsys.readouterr().out)
    assert "every synthetic image is new" in printed
    assert len(list(tmp_path.glob("shapes-*.png"))) == 2
    [sample] = samples(SyntheticShapes(10, 1), count=1)
    _, target = SyntheticShapes(10, 1).load(sample.index, SyntheticShapes(10, 1).whole_plan(sample.index))
    assert sample.original.labels == target["labels"].tolist()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--count", "0"], "count: expected at least 1, got 0."),
        (["--versions", "-1"], "versions: expected at least 1, got -1."),
        (["--augment", "strong"], "Augmentation option augment: synthetic shapes (no images are named) are never"),
        (["--preset", "conditional-detr-tny"], "Unknown preset 'conditional-detr-tny'. Did you mean"),
        (["--coco-path", "missing"], "Image folder missing/train2017 does not exist."),
        (["--flop"], "unknown option '--flop'. Did you mean '--flip'?"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["show-data", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"conddetr show-data: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
