"""Evaluation: perfect, empty and unknown detections; both libraries agree; ranks share a data set."""

import dataclasses
import importlib.util
import json
import tracemalloc

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from detection_cases import from_annotations, noisy
from small_runs import LIMIT

import conddetr
from conddetr.data.coco import coco_split, load_annotations
from conddetr.data.synthetic import SyntheticShapes
from conddetr.data.transforms import EvalTransform
from conddetr.engine.categories import category_ids_of, check_splits
from conddetr.engine.coco_metrics import (
    LIBRARIES,
    METRICS,
    WRITTEN_AT_ONCE,
    Detections,
    coco_library,
    coco_result,
)
from conddetr.engine.evaluator import detect, evaluate

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in LIBRARIES), reason="no library for COCO's metrics is installed"
)

CPU = torch.device("cpu")


class Oracle(torch.nn.Module):
    """Returns the ground truth of a data set's images, in order."""

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


def test_ground_truth_scores_one_and_shifted_boxes_less():
    dataset = SyntheticShapes(30, seed=3)
    perfect = evaluate(Oracle(dataset), dataset.classes, dataset, CPU, batch_size=4)
    assert list(perfect.metrics) == list(METRICS)
    assert perfect.metrics["AP"] == pytest.approx(1.0, abs=1e-6)
    assert [row.ap for row in perfect.per_class] == pytest.approx([1.0] * 3, abs=1e-6)
    shifted = evaluate(Oracle(dataset, shift=0.03), dataset.classes, dataset, CPU, batch_size=7).metrics
    assert shifted["AP"] < 0.8 < shifted["AP50"]


@pytest.mark.parametrize("count", [0, 1, 20_001])
def test_writing_results_needs_little_memory(tmp_path, count):
    rng = np.random.default_rng(0)
    columns = rng.integers(0, 9, count), rng.integers(0, 9, count), rng.random((count, 4)), rng.random(count)
    detections = Detections(*columns[:2], *(column.astype(np.float32) for column in columns[2:]))
    tracemalloc.start()
    detections.write(tmp_path / "results.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert json.loads((tmp_path / "results.json").read_text()) == detections.to_coco()
    # Dicts and text take some 860 bytes per detection while they are written; all at once would be 14 MB.
    assert peak < 1000 * WRITTEN_AT_ONCE


def test_pad_buckets_limits_the_number_of_shapes(small_coco, tiny_model):
    """A compiled model is called with `pad_buckets` shapes only."""
    dataset = coco_split(small_coco.root, "train", EvalTransform(tiny_model.config))
    shapes = []
    tiny_model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[-2:])))
    results = [detect(tiny_model, dataset.classes, dataset, CPU, batch_size=1, pad_buckets=n) for n in (0, 1)]
    assert len(set(shapes[:4])) == 4
    assert len(set(shapes[4:])) == 1
    assert np.array_equal(results[0].image_ids, results[1].image_ids)


@pytest.mark.parametrize("seed", range(3))
def test_both_libraries_agree_on_every_metric(seed):
    for library in LIBRARIES:
        pytest.importorskip(library, reason="compares both libraries")
    truth, detections = noisy(images=60, per_image=12, classes=6, seed=seed)
    fast, slow = (coco_result(truth, detections, library) for library in LIBRARIES)
    assert list(fast.metrics) == list(METRICS)
    assert fast.metrics == pytest.approx(slow.metrics, abs=1e-12)
    assert 0.05 < fast.metrics["AP"] < 0.95
    for ours, theirs in zip(fast.per_class, slow.per_class, strict=True):
        assert vars(ours) == pytest.approx(vars(theirs), abs=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_class_metrics_average_to_the_total(library):
    pytest.importorskip(library, reason="needs this library")
    truth, detections = noisy(images=40, per_image=20, classes=5)
    result = coco_result(truth, detections, library)
    counted = [row for row in result.per_class if row.objects]
    assert np.mean([row.ap for row in counted]) == pytest.approx(result.metrics["AP"])
    assert np.mean([row.ap50 for row in counted]) == pytest.approx(result.metrics["AP50"])
    assert np.mean([row.ap75 for row in counted]) == pytest.approx(result.metrics["AP75"])
    assert np.mean([row.ar100 for row in counted]) == pytest.approx(result.metrics["AR100"])
    # The last class has no objects, so its metrics are undefined.
    assert dataclasses.astuple(result.per_class[-1])[1:] == (0, -1, -1, -1, -1)
    assert sum(row.objects for row in counted) == sum(not a["iscrowd"] for a in truth["annotations"])


def test_images_without_detections_lower_recall():
    truth = SyntheticShapes(10, seed=3).ground_truth()
    detections = from_annotations([a for a in truth["annotations"] if a["image_id"] < 5])
    assert coco_result(truth, detections).metrics["AR100"] < 0.9


def test_annotations_without_area_and_crowd_flag(small_coco):
    for annotation in small_coco.content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    small_coco.write()
    truth = load_annotations(small_coco.file)
    assert coco_result(truth, from_annotations(truth["annotations"])).metrics["AP"] == pytest.approx(1.0, abs=1e-6)


def test_metrics_without_detections_are_zero_if_there_are_objects(small_coco):
    small_coco.annotate(100, [0, 0, 40, 40], 7, area=1600.0)
    small_coco.write()
    truth = load_annotations(small_coco.file)
    none = Detections.join([])
    # Four objects of 1 pixel and one of 1600 pixels, no large ones.
    assert coco_result(truth, none).metrics == {name: -1.0 if name[-1] == "l" else 0.0 for name in METRICS}
    assert set(coco_result({**truth, "annotations": []}, none).metrics.values()) == {-1.0}
    wrong = Detections(np.array([100]), np.array([90]), np.array([[5, 5, 5, 5]], np.float32), np.ones(1, np.float32))
    assert coco_result(truth, wrong).metrics == coco_result(truth, none).metrics


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("images", "first_annotation"), [((1, 2), 0), ((0, 1), 7), ((2**60, 2**60 + 1), 2**62), ((2**53, 2**53 + 1), 0)]
)
def test_ids_of_any_size_are_kept_apart(library, images, first_annotation):
    """By the definition of AP, a detection on its object is right, and one on the other image's object is wrong."""
    pytest.importorskip(library)
    boxes = [[0.0, 0.0, 20.0, 20.0], [50.0, 30.0, 20.0, 20.0]]
    category = 2**61
    truth = {
        "images": [{"id": i, "height": 60, "width": 80} for i in images],
        "annotations": [
            {"id": first_annotation + n, "image_id": i, "category_id": category, "bbox": b, "area": 400.0, "iscrowd": 0}
            for n, (i, b) in enumerate(zip(images, boxes, strict=True))
        ],
        "categories": [{"id": category, "name": "x"}],
    }
    scores = np.array([0.9, 0.8], np.float32)
    correct = Detections(np.array(images), np.full(2, category), np.array(boxes, np.float32), scores)
    assert coco_result(truth, correct, library).metrics["AP"] == pytest.approx(1.0, abs=1e-6)
    swapped = Detections(np.array(images), np.full(2, category), np.array(boxes[::-1], np.float32), scores)
    assert coco_result(truth, swapped, library).metrics["AP"] == 0.0
    unknown = Detections(np.array([3**30]), np.full(1, category), np.array(boxes[:1], np.float32), scores[:1])
    with pytest.raises(ValueError, match=f"image id {3**30}, which is not in annotations"):
        coco_result(truth, unknown, library)


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_get_the_info_that_old_versions_read(library, monkeypatch):
    """pycocotools 2.0.9 and 2.0.10 read `info` of the annotations when they load results."""
    module = pytest.importorskip("pycocotools.coco" if library == "pycocotools" else library)
    load_results = module.COCO.loadRes
    monkeypatch.setattr(
        module.COCO,
        "loadRes",
        lambda self, detections: load_results(self, detections) if "info" in self.dataset else pytest.fail("no info"),
    )
    truth, detections = noisy(images=3, per_image=4, classes=2)
    assert 0 < coco_result(truth, detections, library).metrics["AP"] < 1


def test_description_names_data_and_counts():
    truth, detections = noisy(images=3, per_image=4, classes=2)
    result = coco_result(truth, detections, source="all.json")
    objects = sum(not a["iscrowd"] for a in truth["annotations"])
    assert result.describe().startswith(f"all.json: 3 images, {objects} objects; by ")
    with pytest.raises(ValueError, match=r"test\.json has no list 'annotations'"):
        coco_result({"images": [], "categories": []}, detections, source="test.json")


def test_error_names_an_unknown_category(tiny_model):
    dataset = SyntheticShapes(2, seed=3)
    with pytest.raises(ValueError, match=r"category that the model lacks, id 3 \('triangle'\)"):
        evaluate(tiny_model, [*dataset.classes[:2], {"id": 9, "name": "star"}], dataset, CPU)


def test_id_with_two_names_is_refused_or_matched_by_name_on_request(caplog):
    """The model's ids start at 0 and it has one more class: by id, detections would have the wrong class."""
    dataset = SyntheticShapes(30, seed=3)
    classes = [{"id": label, "name": name} for label, name in enumerate(["disk", "square", "triangle", "star"])]
    for category, number in zip(dataset.classes, (3, 1, 0), strict=True):
        category["id"] = number
    truth = dataset.ground_truth()
    for annotation in truth["annotations"]:
        annotation["category_id"] = dataset.classes[annotation["category_id"] - 1]["id"]
    truth["categories"] = dataset.classes
    with pytest.raises(ValueError, match=r"id 3 is 'disk' in the data set and 'star' in the model \(2 such ids\)"):
        detect(Oracle(dataset), classes, dataset, CPU)
    detections = detect(Oracle(dataset), classes, dataset, CPU, batch_size=4, by_name=True)
    assert coco_result(truth, detections).metrics["AP"] == pytest.approx(1.0, abs=1e-6)
    assert "matched by name, 'disk' is id 3" in caplog.text


def test_classes_are_compared_by_id_and_name(caplog):
    data = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    assert category_ids_of(data, data[::-1]) == [7, 3]
    assert not caplog.text
    # A model without class names is matched by ids, with a warning.
    assert category_ids_of([{"id": number, "name": f"LABEL_{number}"} for number in range(8)], data) == list(range(8))
    assert category_ids_of([{"id": number, "name": f"{number}"} for number in range(8)], data) == list(range(8))
    assert "The model's classes have no names: they are matched by id, id 7 is 'cat'" in caplog.text
    # Numbers are real names if they are not the ids.
    digits = [{"id": digit + 1, "name": f"{digit}"} for digit in range(10)]
    with pytest.raises(ValueError, match="id 7 is 'cat' in the data set and '6' in the model"):
        category_ids_of(digits, data)
    # Different ids, the same names: no id has two names.
    assert category_ids_of([{"id": 10, "name": "dog"}, {"id": 11, "name": "cat"}], data) == [3, 7]
    with pytest.raises(ValueError, match="Two categories have the name 'cat'"):
        category_ids_of([{"id": 10, "name": "dog"}, {"id": 11, "name": "cat"}], [*data, {"id": 8, "name": "cat"}])


def test_splits_need_the_same_categories():
    train = [{"id": 1, "name": "disk"}, {"id": 2, "name": "square"}]
    check_splits(train, train[:1])
    with pytest.raises(ValueError, match="id 1 is 'disk' in the training set and 'square' in the validation set"):
        check_splits(train, [{"id": 1, "name": "square"}, {"id": 2, "name": "disk"}])
    with pytest.raises(ValueError, match=r"id 3 \('star'\) is in the validation set and not in the training set"):
        check_splits(train, [{"id": 3, "name": "star"}])


def test_results_file_is_cocos_format(tmp_path):
    _, detections = noisy(images=3, per_image=4, classes=2)
    detections.write(tmp_path / "new" / "results.json")
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["results.json"]
    assert len(results) == 12
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}
    assert results[0]["bbox"] == detections.boxes[0].tolist()


def test_error_names_a_missing_or_unknown_library(monkeypatch):
    with pytest.raises(ValueError, match="expected one of faster_coco_eval, pycocotools, got 'coco'"):
        coco_library("coco")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="need faster_coco_eval: pip install faster-coco-eval"):
        coco_library("faster_coco_eval")
    with pytest.raises(ModuleNotFoundError, match="pip install pycocotools"):
        coco_library()


def _detect_on_rank(rank, world, rendezvous, state, queue):
    """One of two processes, with 5 or 4 images."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    model = conddetr.build("conditional-detr-tiny", num_classes=3)
    model.load_state_dict(state)
    dataset = SyntheticShapes(9, seed=3)
    calls = []
    detections = detect(
        model, dataset.classes, dataset, CPU, batch_size=1, rank=rank, world=world, on_batch=lambda: calls.append(1)
    )
    assert len(calls) == 5
    if rank == 0:
        queue.put(detections)
    else:
        assert detections is None
    torch.distributed.destroy_process_group()


@pytest.fixture
def _one_thread():
    """One thread, like the ranks: with another number, rounding differs and detections of nearly equal scores swap."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_two_ranks_detect_the_same_as_one(tiny_model, tmp_path):
    dataset = SyntheticShapes(9, seed=3)
    expected = detect(tiny_model, dataset.classes, dataset, CPU, batch_size=1)
    context = mp.get_context("fork")
    queue = context.Queue()
    ranks = [
        context.Process(target=_detect_on_rank, args=(rank, 2, tmp_path / "meet", tiny_model.state_dict(), queue))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    detections = queue.get(timeout=LIMIT)
    for process in ranks:
        process.join(LIMIT)
        assert process.exitcode == 0
    assert len(np.unique(detections.image_ids)) == 9
    for name, values in vars(detections).items():
        np.testing.assert_array_equal(values, getattr(expected, name), err_msg=name)


def test_memory_per_detection_is_constant():
    _, detections = noisy(images=10, per_image=10, classes=2)
    joined = Detections.join([detections] * 5)
    assert sum(array.nbytes for array in vars(joined).values()) == 36 * 500
