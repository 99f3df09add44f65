"""The data benchmark: the official chain matches its source, both chains agree, and a chain that differs is refused."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as official

from conddetr.config import resolve
from conddetr.data import bench
from conddetr.data.bench import bench_data, official_chain
from conddetr.data.coco import coco_split
from conddetr.data.images import MEAN, STD
from conddetr.data.transforms import Crop, Plan, TrainTransform


def real_set(coco_path, preset):
    return coco_split(coco_path, "train", TrainTransform(resolve(preset)))


def test_both_chains_agree_on_real_images(coco_path):
    result = bench_data(real_set(coco_path, "conditional-detr-r50"), images=12, rounds=1)
    assert (result.images, result.reduced) == (12, 0)
    assert result.max_levels <= 2
    small = bench_data(real_set(coco_path, "conditional-detr-tiny"), images=24, rounds=1)
    assert small.reduced > 0
    assert small.mean_levels <= 4
    assert len(small.ours) == len(small.official) == 1


def test_the_official_chain_equals_its_steps(small_coco):
    path = small_coco.images / "3.jpg"
    crop = Crop(height=64, width=64, top=3, left=5, rows=40, columns=50)
    image = Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((64, 64), Image.Resampling.BILINEAR)
    image = image.crop((5, 3, 55, 43)).resize((90, 80), Image.Resampling.BILINEAR)
    expected = official.normalize(official.to_tensor(image), MEAN, STD)
    assert torch.equal(official_chain(path, Plan(True, crop, 80, 90)), expected)


def test_chains_that_disagree_are_refused(small_coco, monkeypatch):
    dataset = coco_split(small_coco.root, "train", TrainTransform(resolve("conditional-detr-tiny")))
    assert bench_data(dataset, rounds=1).speedup > 0
    monkeypatch.setattr(bench, "to_model_input", lambda image: torch.zeros(image.shape))
    with pytest.raises(ValueError, match=r"Image file .*0\.jpg: (max|mean)_levels between the official chain and ours"):
        bench_data(dataset, rounds=1)


def test_a_device_has_one_rate_per_round(small_coco):
    dataset = coco_split(small_coco.root, "train", TrainTransform(resolve("conditional-detr-tiny")))
    assert bench_data(dataset, rounds=1).on_device == []
    result = bench_data(dataset, rounds=3, device=torch.device("cpu"))
    assert len(result.on_device) == 3
    assert min(result.on_device) > 0
    assert result.table().row_count == 3
