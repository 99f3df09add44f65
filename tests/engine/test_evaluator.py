"""Evaluation: perfect, empty and unknown."""

import pytest
import torch

import conddetr
from conddetr.data.coco import load_annotations
from conddetr.data.synthetic import SyntheticShapes
from conddetr.engine.evaluator import METRICS, coco_metrics, evaluate

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")


class Oracle(torch.nn.Module):
    """Answers with the ground truth of the images it is shown, in order."""

    config = conddetr.config.resolve("conditional-detr-tiny", num_classes=3)

    def __init__(self, dataset, shift=0.0):
        super().__init__()
        self.targets = iter([dataset[index][1] for index in range(len(dataset))])
        self.shift = shift

    def forward(self, images, valid_hw=None):
        logits, boxes = torch.full((len(images), 4, 3), -20.0), torch.zeros(len(images), 4, 4)
        for index in range(len(images)):
            target = next(self.targets)
            count = len(target["labels"])
            logits[index, torch.arange(count), target["labels"]] = 20.0
            boxes[index, :count] = target["boxes"]
            boxes[index, :count, 0] += self.shift
        return {"pred_logits": logits, "pred_boxes": boxes}


CPU = torch.device("cpu")


def test_the_truth_scores_one_and_a_shift_less():
    dataset = SyntheticShapes(30, seed=3)
    perfect = evaluate(Oracle(dataset), dataset.classes, dataset, CPU, batch_size=4)
    assert list(perfect) == list(METRICS)
    assert perfect["AP"] == pytest.approx(1.0, abs=1e-6)
    shifted = evaluate(Oracle(dataset, shift=0.03), dataset.classes, dataset, CPU, batch_size=7)
    assert shifted["AP"] < 0.8 < shifted["AP50"]


def test_images_without_a_detection_count_against_recall():
    dataset = SyntheticShapes(10, seed=3)
    truth = dataset.ground_truth()
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in truth["annotations"]
        if a["image_id"] < 5
    ]
    assert coco_metrics(truth, results)["AR100"] < 0.9


def test_annotations_without_area_and_crowd_flag(small_coco):
    for annotation in small_coco.content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    small_coco.write()
    truth = load_annotations(small_coco.file)
    results = [{**annotation, "score": 0.9} for annotation in truth["annotations"]]
    assert coco_metrics(truth, results)["AP"] == pytest.approx(1.0, abs=1e-6)


def test_no_detection_at_all_is_zero():
    assert set(coco_metrics(SyntheticShapes(2, seed=3).ground_truth(), []).values()) == {0.0}


def test_unknown_categories_are_named(tiny_model):
    dataset = SyntheticShapes(2, seed=3)
    with pytest.raises(ValueError, match=r"1 categories that the model does not know, first id 3 \('triangle'\)"):
        evaluate(tiny_model, [*dataset.classes[:2], {"id": 9, "name": "star"}], dataset, CPU)
