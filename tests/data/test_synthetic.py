"""The synthetic set is repeatable and endless, and its boxes match its shapes."""

import numpy as np
import torch

from conddetr.data.synthetic import MAX_OVERLAP, MAX_SHAPES, SyntheticShapes, _overlap


def test_images_are_repeatable_and_differ_by_index_and_seed():
    first, second, other = SyntheticShapes(10, seed=1), SyntheticShapes(10, seed=1), SyntheticShapes(10, seed=2)
    assert torch.equal(first[3][0], second[3][0])
    assert torch.equal(first[3][1]["boxes"], second[3][1]["boxes"])
    assert not torch.equal(first[3][0], first[4][0])
    assert not torch.equal(first[3][0], other[3][0])
    assert first[10**9][0].shape == (3, 128, 128)


def test_targets_are_valid():
    dataset = SyntheticShapes(100, seed=5)
    labels = []
    for index in range(100):
        _, target = dataset[index]
        _, _, boxes = dataset.draw(index)
        assert 1 <= len(boxes) <= MAX_SHAPES
        assert all(_overlap(a, b) <= MAX_OVERLAP for i, a in enumerate(boxes) for b in boxes[:i])
        assert (np.array(boxes) >= 0).all()
        assert (np.array(boxes) <= 128).all()
        labels += target["labels"].tolist()
    assert set(labels) == {0, 1, 2}


def test_ground_truth_matches_the_samples():
    dataset = SyntheticShapes(20, seed=5)
    truth = dataset.ground_truth()["annotations"]
    for index in range(20):
        _, target = dataset[index]
        annotations = [a for a in truth if a["image_id"] == index]
        assert [a["category_id"] - 1 for a in annotations] == target["labels"].tolist()
        for annotation, (cx, cy, w, h) in zip(annotations, (target["boxes"] * 128).tolist(), strict=True):
            np.testing.assert_allclose(annotation["bbox"], [cx - w / 2, cy - h / 2, w, h], atol=1e-3)
