"""The data benchmark runs where there are no images."""

from conddetr.config import resolve
from conddetr.data.coco import coco_split
from conddetr.data.transforms import EvalTransform
from models import data


def test_shapes_become_files_with_their_boxes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES", 3)
    dataset = coco_split(data.shape_files(tmp_path), "train", EvalTransform(resolve("conditional-detr-r50")))
    assert len(dataset) == 3
    assert dataset.objects == sum(len(entry["bbox"]) == 4 for entry in dataset.ground_truth()["annotations"]) > 0
    assert all(50_000 < (tmp_path / "train2017" / f"{index}.jpg").stat().st_size < 400_000 for index in range(3))
    assert dataset.load(0, dataset.whole_plan(0))[0].shape == (3, data.SIDE, data.SIDE)
