"""The whole training loop learns: it overfits four real images."""

import functools

import pytest
import torch

import conddetr
from conddetr.config.run import RunConfig, tiny_train_config
from conddetr.data.coco import CocoDetection, coco_split
from conddetr.data.transforms import EvalTransform
from conddetr.engine.trainer import Trainer

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")


@pytest.mark.slow
def test_four_real_images_are_overfitted(coco_path, tmp_path):
    torch.manual_seed(0)
    whole = coco_split(coco_path, "train", EvalTransform(conddetr.config.resolve("conditional-detr-tiny")))
    model = conddetr.build("conditional-detr-tiny", num_classes=len(whole.classes))
    few = [image_id for index, image_id in enumerate(whole.image_ids) if 1 <= len(whole[index][1]["labels"]) <= 6][:4]
    images = CocoDetection(whole.image_dir, whole.annotation_file, whole.transform, image_ids=few)
    # Cached, because decoding them in every epoch would take most of the time.
    images.load = functools.cache(images.load)
    config = tiny_train_config(epochs=130, batch_size=4, lr=2e-3, lr_backbone=2e-3, lr_drop=100, eval_every=130)
    run = RunConfig(output_dir=str(tmp_path), train=config)
    assert Trainer(model, images, images, run, torch.device("cpu")).fit()["AP50"] >= 0.9
