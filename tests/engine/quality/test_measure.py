"""Curves, best thresholds, confusion matrix and kinds of errors, against COCO's metrics, hand counts and properties."""

import importlib.util

import numpy as np
import pytest
from detection_cases import from_annotations, noisy
from hypothesis import given, settings
from hypothesis import strategies as st

from conddetr.engine.coco_metrics import LIBRARIES, Detections, coco_result
from conddetr.engine.quality import IOU, KINDS, measure_quality, overlaps
from conddetr.engine.quality.errors import confusion_matrix, find_errors
from conddetr.engine.quality.matching import match
from conddetr.engine.quality.overlaps import find_overlaps

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in LIBRARIES), reason="no library for COCO's metrics is installed"
)

NAMES = ("cat", "dog", "bird", "person")
CAT, DOG, BIRD, PERSON = range(1, 5)


def scene(objects, images=1):
    """Ground truth in COCO's format; objects are (image, category, xywh) or (image, category, xywh, 1) for a crowd."""
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3]}
        | {"iscrowd": crowd[0] if crowd else 0}
        for n, (image, category, box, *crowd) in enumerate(objects, 1)
    ]
    sizes = [{"id": image, "height": 100, "width": 100} for image in range(1, images + 1)]
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
    return {"images": sizes, "annotations": annotations, "categories": categories}


def detections_of(rows):
    """Detections from (image, category, xywh, score)."""
    images, categories, boxes, scores = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Detections(
        np.array(images, np.int64),
        np.array(categories, np.int64),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
    )


HAND_MADE = scene(
    [
        (1, CAT, (0, 0, 20, 20)),
        (1, DOG, (50, 0, 20, 20)),
        (1, BIRD, (0, 60, 10, 10)),
        (1, PERSON, (50, 50, 40, 40), 1),
    ]
)
WITH_EVERY_ERROR = [
    (1, CAT, (0, 0, 20, 18), 0.9),
    (1, CAT, (0, 0, 20, 16), 0.8),
    (1, DOG, (0, 0, 20, 20), 0.7),
    # Moved by 10 of 20 pixels: the IoU is 1/3.
    (1, DOG, (60, 0, 20, 20), 0.6),
    (1, BIRD, (60, 0, 20, 20), 0.5),
    (1, BIRD, (30, 40, 10, 10), 0.4),
    (1, PERSON, (55, 55, 10, 10), 0.3),
]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("seed", range(3))
def test_area_under_each_class_curve_is_cocos_ap(library, seed, monkeypatch):
    pytest.importorskip(library, reason="compares with this library, and uses its IoU")
    monkeypatch.setattr(overlaps, "coco_library", lambda: library)
    truth, detections = noisy(images=60, per_image=12, classes=6, seed=seed)
    quality, result = measure_quality(truth, detections), coco_result(truth, detections, library)
    for label, row in enumerate(result.per_class):
        if row.objects == 0:
            assert np.isnan(quality.precision[label]).all()
            assert quality.class_best[label] is None
            continue
        assert quality.precision[label].mean() == pytest.approx(row.ap50, abs=1e-6)
        assert quality.strict_precision[label].mean() == pytest.approx(row.ap75, abs=1e-6)
        assert quality.objects[label] == row.objects


def test_only_the_best_hundred_of_an_image_and_class_count():
    """As in COCO: the right detection is the one after the limit, or the last within it."""
    truth = scene([(1, CAT, (0, 0, 20, 20))])
    right = (1, CAT, (0, 0, 20, 20), 0.1)
    for wrong, ap in ((99, 1 / 100), (100, 0.0)):
        detections = detections_of([right, *[(1, CAT, (70, 70, 9, 9), 0.9)] * wrong])
        assert measure_quality(truth, detections).precision[0].mean() == pytest.approx(ap)
        assert coco_result(truth, detections).per_class[0].ap50 == pytest.approx(ap)


def test_hand_counted_kinds_of_errors():
    pairs = find_overlaps(HAND_MADE, detections_of(WITH_EVERY_ERROR[::-1]))
    errors = find_errors(pairs, match(pairs, IOU), IOU, threshold=0.0)
    expected = ["duplicate", "wrong class", "bad location", "wrong class and bad location", "background"]
    assert [KINDS[kind] for kind in errors.kinds] == expected
    assert errors.wrong.tolist() == [1, 2, 3, 4, 5]
    assert errors.nearest.tolist() == [0, 0, 1, 1, -1]
    # The dog is explained by its badly placed detection, the bird by nothing.
    assert errors.undetected.tolist() == [1, 2]
    assert errors.missed.tolist() == [False, True]
    assert errors.counts() == dict.fromkeys(KINDS, 1)
    # At 0.9 all objects but the cat lack a detection, and nothing explains it.
    assert find_errors(pairs, match(pairs, IOU), IOU, threshold=0.9).counts() == {
        **dict.fromkeys(KINDS, 0),
        "missed": 2,
    }


def test_hand_counted_confusion_matrix():
    pairs = find_overlaps(HAND_MADE, detections_of(WITH_EVERY_ERROR))
    matrix = confusion_matrix(pairs, match(pairs, IOU, same_class=False), threshold=0.0)
    assert matrix.tolist() == [
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
        [1, 2, 2, 0, 0],
    ]


def test_hand_counted_best_threshold():
    quality = measure_quality(HAND_MADE, detections_of(WITH_EVERY_ERROR))
    # From 0.801 to 0.9 one detection counts, and it is right, of three objects: F1 is 2 · 1 / (1 + 3).
    assert quality.best.threshold == 0.851
    assert (quality.best.precision, quality.best.recall, quality.best.f1) == pytest.approx((1, 1 / 3, 0.5))
    # At 0 all count but the one in the crowd.
    assert (quality.curve.kept[0], quality.curve.right[0], quality.curve.objects) == (6, 1, 3)
    assert quality.curve.f1[0] == pytest.approx(2 / 9)
    assert np.isnan(quality.curve.precision[901:]).all()
    # Dogs and birds have no right detection, persons no object.
    assert [best and best.f1 for best in quality.class_best] == [1, None, None, None]
    assert quality.objects.tolist() == [1, 1, 1, 0]


def test_matrix_gives_an_object_to_its_most_confident_detection_of_any_class():
    truth = scene([(1, CAT, (0, 0, 20, 20)), (1, DOG, (50, 0, 20, 20))])
    rows = [(1, DOG, (0, 0, 20, 19), 0.9), (1, CAT, (0, 0, 20, 20), 0.8), (1, DOG, (50, 0, 20, 20), 0.7)]
    quality = measure_quality(truth, detections_of(rows))
    assert quality.threshold <= 0.7
    assert quality.confusion.tolist() == [
        [0, 1, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
    ]


def test_detection_takes_the_free_object_with_the_highest_iou():
    truth = scene([(1, CAT, (0, 0, 20, 20)), (1, CAT, (4, 0, 20, 20))])
    # The first has an IoU of 2/3 with the first object too; the second only reaches that one.
    rows = [(1, CAT, (4, 0, 20, 20), 0.9), (1, CAT, (0, 0, 14, 20), 0.8)]
    assert measure_quality(truth, detections_of(rows)).best.f1 == 1


def test_crowd_makes_detections_of_its_class_neither_right_nor_wrong():
    truth = scene([(1, PERSON, (0, 0, 100, 50), 1), (1, PERSON, (0, 60, 20, 30))])
    inside = [(1, PERSON, (5, 5, 10, 20), 0.9), (1, PERSON, (30, 5, 10, 20), 0.9)]
    quality = measure_quality(truth, detections_of([*inside, (1, PERSON, (0, 60, 20, 30), 0.5)]))
    assert (quality.best.precision, quality.best.recall) == (1, 1)
    assert quality.confusion.sum() == 1
    assert sum(quality.errors.counts().values()) == 0
    # Of another class it is wrong.
    quality = measure_quality(truth, detections_of([(1, CAT, (5, 5, 10, 20), 0.9)]))
    assert quality.confusion[-1].tolist() == [1, 0, 0, 0, 0]


def test_without_a_right_detection_no_threshold_is_best():
    truth = scene([(1, CAT, (0, 0, 20, 20))])
    for rows in ([], [(1, CAT, (60, 60, 20, 20), 0.9)]):
        quality = measure_quality(truth, detections_of(rows))
        assert quality.best is None
        assert quality.threshold == 0.5
        assert quality.confusion[:, -1].tolist() == [1, 0, 0, 0, 0]
        assert quality.errors.counts()["missed"] == 1
    empty = measure_quality(scene([]), detections_of([]))
    assert empty.best is None
    assert np.isnan(empty.curve.f1).all()
    assert np.isnan(empty.precision).all()


def test_detections_of_unknown_categories_are_dropped_and_unknown_images_refused():
    truth = scene([(1, CAT, (0, 0, 20, 20))])
    assert measure_quality(truth, detections_of([(1, 9, (0, 0, 20, 20), 0.9)])).confusion[-1].sum() == 0
    with pytest.raises(ValueError, match=r"image id 7, which is not in val\.json"):
        measure_quality(truth, detections_of([(7, CAT, (0, 0, 20, 20), 0.9)]), "val.json")


sides = st.integers(1, 12)
boxes = st.tuples(st.integers(0, 20), st.integers(0, 20), sides, sides)
annotated = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), boxes, st.integers(0, 5).map(lambda n: n == 0)))
detected = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), boxes), max_size=25)


@settings(max_examples=60, deadline=None)
@given(objects=annotated, rows=detected, data=st.data())
def test_counts_add_up_in_any_order_of_detections(objects, rows, data):
    truth = scene([(*row[:3], int(row[3])) for row in objects], images=3)
    # Different scores, some of them between the thresholds.
    scores = data.draw(st.permutations([(n + 1) / 26 for n in range(len(rows))]))
    entries = [(*row, score) for row, score in zip(rows, scores, strict=True)]
    first = measure_quality(truth, detections_of(entries))
    second = measure_quality(truth, detections_of(data.draw(st.permutations(entries))))
    assert (first.confusion == second.confusion).all()
    assert first.errors.counts() == second.errors.counts()
    assert (first.best, first.class_best) == (second.best, second.class_best)
    np.testing.assert_array_equal(first.precision, second.precision)

    assert first.confusion[:-1].sum(1).tolist() == first.objects.tolist()
    position = round(1000 * first.threshold)
    kept, right = int(first.curve.kept[position]), int(first.curve.right[position])
    counts = first.errors.counts()
    assert len(first.errors.wrong) == kept - right == sum(counts.values()) - counts["missed"]
    assert len(first.errors.undetected) == first.objects.sum() - right
    if first.best:
        assert first.best.f1 == np.nanmax(first.curve.f1)
        precision, recall = first.best.precision, first.best.recall
        assert first.best.f1 == pytest.approx(2 * precision * recall / (precision + recall))


@settings(max_examples=40, deadline=None)
@given(objects=annotated.filter(lambda rows: any(not row[3] for row in rows)))
def test_perfect_detections_have_f1_of_one_and_no_errors(objects):
    truth = scene([(*row[:3], int(row[3])) for row in objects], images=3)
    real = [annotation for annotation in truth["annotations"] if not annotation["iscrowd"]]
    quality = measure_quality(truth, from_annotations(real))
    # Boxes that several classes share may be exchanged in the matrix, which ignores classes when it matches.
    assert quality.best.f1 == 1
    assert not quality.errors.wrong.size
    assert not quality.errors.undetected.size
    assert quality.precision[quality.objects > 0] == pytest.approx(1)
    assert quality.confusion[-1].sum() == quality.confusion[:, -1].sum() == 0
