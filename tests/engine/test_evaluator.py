"""Evaluation: perfect, empty, unknown; both libraries agree; ranks share a data set and add up."""

import dataclasses
import importlib.util
import json
import tracemalloc

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
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


def from_annotations(annotations, score=0.9):
    """Detections that are those annotations."""
    return Detections(
        np.array([a["image_id"] for a in annotations], np.int64),
        np.array([a["category_id"] for a in annotations], np.int64),
        np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4),
        np.full(len(annotations), score, np.float32),
    )


def noisy(images, per_image, classes, seed=0):
    """Random annotations in COCO's format, crowds among them, and detections that find some of them."""
    rng = np.random.default_rng(seed)
    count = images * 8
    boxes = np.concatenate([rng.uniform(0, 500, (count, 2)), np.exp(rng.uniform(1.5, 5.5, (count, 2)))], 1)
    annotations = [
        {
            "id": index + 1,
            "image_id": 7 * (index // 8),
            "category_id": int(rng.integers(1, classes + 1)),
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(rng.random() < 0.02),
        }
        for index, box in enumerate(boxes.tolist())
    ]
    truth = {
        "images": [{"id": 7 * index, "height": 800, "width": 800} for index in range(images)],
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": f"class {index}"} for index in range(classes + 1)],
    }
    of_image = rng.integers(0, 8, (images, per_image)) + 8 * np.arange(images)[:, None]
    chosen = [annotations[index] for index in of_image.flatten().tolist()]
    found = from_annotations(chosen)
    size = found.boxes[:, 2:].copy()
    found.boxes[:, :2] += rng.normal(0, 0.05, size.shape) * size
    found.boxes[:, 2:] *= np.exp(rng.normal(0, 0.05, size.shape))
    wrong = rng.random(len(found)) < 0.3
    found.category_ids[wrong] = rng.integers(1, classes + 3, wrong.sum())
    found.scores = (rng.random(len(found)) * np.where(wrong, 0.6, 1)).astype(np.float32)
    return truth, found


def test_the_truth_scores_one_and_a_shift_less():
    dataset = SyntheticShapes(30, seed=3)
    perfect = evaluate(Oracle(dataset), dataset.classes, dataset, CPU, batch_size=4)
    assert list(perfect.metrics) == list(METRICS)
    assert perfect.metrics["AP"] == pytest.approx(1.0, abs=1e-6)
    assert [row.ap for row in perfect.per_class] == pytest.approx([1.0] * 3, abs=1e-6)
    shifted = evaluate(Oracle(dataset, shift=0.03), dataset.classes, dataset, CPU, batch_size=7).metrics
    assert shifted["AP"] < 0.8 < shifted["AP50"]


@pytest.mark.parametrize("count", [0, 1, 20_001])
def test_results_are_written_in_little_memory(tmp_path, count):
    rng = np.random.default_rng(0)
    columns = rng.integers(0, 9, count), rng.integers(0, 9, count), rng.random((count, 4)), rng.random(count)
    found = Detections(*columns[:2], *(column.astype(np.float32) for column in columns[2:]))
    tracemalloc.start()
    found.write(tmp_path / "results.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert json.loads((tmp_path / "results.json").read_text()) == found.to_coco()
    # Dicts and text take some 860 bytes per detection while they are made; of all at once it would be 14 MB.
    assert peak < 1000 * WRITTEN_AT_ONCE


def test_padding_to_few_shapes_is_that_of_training(small_coco, tiny_model):
    """A compiled model sees so many shapes."""
    dataset = coco_split(small_coco.root, "train", EvalTransform(tiny_model.config))
    seen = []
    tiny_model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    found = [detect(tiny_model, dataset.classes, dataset, CPU, batch_size=1, pad_buckets=n) for n in (0, 1)]
    assert len(set(seen[:4])) == 4
    assert len(set(seen[4:])) == 1
    assert np.array_equal(found[0].image_ids, found[1].image_ids)


@pytest.mark.parametrize("seed", range(3))
def test_both_libraries_agree_on_every_number(seed):
    for library in LIBRARIES:
        pytest.importorskip(library, reason="compares both libraries")
    truth, found = noisy(images=60, per_image=12, classes=6, seed=seed)
    fast, slow = (coco_result(truth, found, library) for library in LIBRARIES)
    assert list(fast.metrics) == list(METRICS)
    assert fast.metrics == pytest.approx(slow.metrics, abs=1e-12)
    assert 0.05 < fast.metrics["AP"] < 0.95
    for ours, theirs in zip(fast.per_class, slow.per_class, strict=True):
        assert vars(ours) == pytest.approx(vars(theirs), abs=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_classes_average_to_the_whole(library):
    pytest.importorskip(library, reason="asks for this library")
    truth, found = noisy(images=40, per_image=20, classes=5)
    result = coco_result(truth, found, library)
    counted = [row for row in result.per_class if row.objects]
    assert np.mean([row.ap for row in counted]) == pytest.approx(result.metrics["AP"])
    assert np.mean([row.ap50 for row in counted]) == pytest.approx(result.metrics["AP50"])
    assert np.mean([row.ap75 for row in counted]) == pytest.approx(result.metrics["AP75"])
    assert np.mean([row.ar100 for row in counted]) == pytest.approx(result.metrics["AR100"])
    # The last class has no object: nothing counts.
    assert dataclasses.astuple(result.per_class[-1])[1:] == (0, -1, -1, -1, -1)
    assert sum(row.objects for row in counted) == sum(not a["iscrowd"] for a in truth["annotations"])


def test_images_without_a_detection_count_against_recall():
    truth = SyntheticShapes(10, seed=3).ground_truth()
    found = from_annotations([a for a in truth["annotations"] if a["image_id"] < 5])
    assert coco_result(truth, found).metrics["AR100"] < 0.9


def test_annotations_without_area_and_crowd_flag(small_coco):
    for annotation in small_coco.content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    small_coco.write()
    truth = load_annotations(small_coco.file)
    assert coco_result(truth, from_annotations(truth["annotations"])).metrics["AP"] == pytest.approx(1.0, abs=1e-6)


def test_no_detection_at_all_is_zero_where_there_are_objects(small_coco):
    small_coco.annotate(100, [0, 0, 40, 40], 7, area=1600.0)
    small_coco.write()
    truth = load_annotations(small_coco.file)
    none = Detections.join([])
    # Four objects of 1 pixel and one of 1600: no large ones.
    assert coco_result(truth, none).metrics == {name: -1.0 if name[-1] == "l" else 0.0 for name in METRICS}
    assert set(coco_result({**truth, "annotations": []}, none).metrics.values()) == {-1.0}
    one_wrong = Detections(
        np.array([100]), np.array([90]), np.array([[5, 5, 5, 5]], np.float32), np.ones(1, np.float32)
    )
    assert coco_result(truth, one_wrong).metrics == coco_result(truth, none).metrics


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("images", "first_annotation"), [((1, 2), 0), ((0, 1), 7), ((2**60, 2**60 + 1), 2**62), ((2**53, 2**53 + 1), 0)]
)
def test_ids_are_names_whatever_their_size(library, images, first_annotation):
    """A detection on its object is right, and one on the other image's object is wrong, by the definition of AP."""
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
    own = Detections(np.array(images), np.full(2, category), np.array(boxes, np.float32), scores)
    assert coco_result(truth, own, library).metrics["AP"] == pytest.approx(1.0, abs=1e-6)
    others = Detections(np.array(images), np.full(2, category), np.array(boxes[::-1], np.float32), scores)
    assert coco_result(truth, others, library).metrics["AP"] == 0.0
    strange = Detections(np.array([3**30]), np.full(1, category), np.array(boxes[:1], np.float32), scores[:1])
    with pytest.raises(ValueError, match=f"image id {3**30}, which is not in annotations"):
        coco_result(truth, strange, library)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_libraries_get_what_old_versions_ask_for(library, monkeypatch):
    """pycocotools 2.0.9 and 2.0.10 read `info` of the annotations when they take results."""
    package = pytest.importorskip(library)
    load_results = package.COCO.loadRes if hasattr(package, "COCO") else package.coco.COCO.loadRes
    monkeypatch.setattr(
        package.COCO if hasattr(package, "COCO") else package.coco.COCO,
        "loadRes",
        lambda self, found: load_results(self, found) if "info" in self.dataset else pytest.fail("no info"),
    )
    truth, found = noisy(images=3, per_image=4, classes=2)
    assert 0 < coco_result(truth, found, library).metrics["AP"] < 1


def test_what_the_numbers_are_of_is_said():
    truth, found = noisy(images=3, per_image=4, classes=2)
    result = coco_result(truth, found, source="all.json")
    objects = sum(not a["iscrowd"] for a in truth["annotations"])
    assert result.describe().startswith(f"all.json: 3 images, {objects} objects; by ")
    with pytest.raises(ValueError, match=r"test\.json has no list 'annotations'"):
        coco_result({"images": [], "categories": []}, found, source="test.json")


def test_unknown_categories_are_named(tiny_model):
    dataset = SyntheticShapes(2, seed=3)
    with pytest.raises(ValueError, match=r"category that the model lacks, id 3 \('triangle'\)"):
        evaluate(tiny_model, [*dataset.classes[:2], {"id": 9, "name": "star"}], dataset, CPU)


def test_one_id_with_two_names_is_refused_or_matched_by_name_on_demand(caplog):
    """With ids from 0, one more class and the first three in order: by id every detection would be off by one."""
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
    found = detect(Oracle(dataset), classes, dataset, CPU, batch_size=4, by_name=True)
    assert coco_result(truth, found).metrics["AP"] == pytest.approx(1.0, abs=1e-6)
    assert "matched by name, 'disk' is id 3" in caplog.text


def test_classes_are_compared_by_id_and_name(caplog):
    data = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    assert category_ids_of(data, data[::-1]) == [7, 3]
    assert not caplog.text
    # A model without names goes by ids, and says so.
    assert category_ids_of([{"id": number, "name": f"LABEL_{number}"} for number in range(8)], data) == list(range(8))
    assert category_ids_of([{"id": number, "name": f"{number}"} for number in range(8)], data) == list(range(8))
    assert "The model's classes have no names: they are matched by id, id 7 is 'cat'" in caplog.text
    # Numbers as names are names where they are not the ids.
    digits = [{"id": digit + 1, "name": f"{digit}"} for digit in range(10)]
    with pytest.raises(ValueError, match="id 7 is 'cat' in the data set and '6' in the model"):
        category_ids_of(digits, data)
    # Other ids, the same names: no id has two names.
    assert category_ids_of([{"id": 10, "name": "dog"}, {"id": 11, "name": "cat"}], data) == [3, 7]
    with pytest.raises(ValueError, match="Two categories have the name 'cat'"):
        category_ids_of([{"id": 10, "name": "dog"}, {"id": 11, "name": "cat"}], [*data, {"id": 8, "name": "cat"}])


def test_splits_need_one_list_of_categories():
    train = [{"id": 1, "name": "disk"}, {"id": 2, "name": "square"}]
    check_splits(train, train[:1])
    with pytest.raises(ValueError, match="id 1 is 'disk' in the training set and 'square' in the validation set"):
        check_splits(train, [{"id": 1, "name": "square"}, {"id": 2, "name": "disk"}])
    with pytest.raises(ValueError, match=r"id 3 \('star'\) is in the validation set and not in the training set"):
        check_splits(train, [{"id": 3, "name": "star"}])


def test_results_file_is_cocos_format(tmp_path):
    _, found = noisy(images=3, per_image=4, classes=2)
    found.write(tmp_path / "new" / "results.json")
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["results.json"]
    assert len(results) == 12
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}
    assert results[0]["bbox"] == found.boxes[0].tolist()


def test_a_library_that_is_missing_or_unknown_is_named(monkeypatch):
    with pytest.raises(ValueError, match="expected one of faster_coco_eval, pycocotools, got 'coco'"):
        coco_library("coco")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="need faster_coco_eval: pip install faster-coco-eval"):
        coco_library("faster_coco_eval")
    with pytest.raises(ModuleNotFoundError, match="pip install pycocotools"):
        coco_library()


def _detect_on_rank(rank, world, rendezvous, state, queue):
    """One of two processes; the ranks' loads differ: 5 and 4 images."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    model = conddetr.build("conditional-detr-tiny", num_classes=3)
    model.load_state_dict(state)
    dataset = SyntheticShapes(9, seed=3)
    calls = []
    found = detect(
        model, dataset.classes, dataset, CPU, batch_size=1, rank=rank, world=world, on_batch=lambda: calls.append(1)
    )
    assert len(calls) == 5
    if rank == 0:
        queue.put(found)
    else:
        assert found is None
    torch.distributed.destroy_process_group()


@pytest.fixture
def _one_thread():
    """As the ranks have: another number of threads rounds differently, and detections of nearly one score swap."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_two_ranks_find_what_one_finds(tiny_model, tmp_path):
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
    found = queue.get(timeout=LIMIT)
    for process in ranks:
        process.join(LIMIT)
        assert process.exitcode == 0
    assert len(np.unique(found.image_ids)) == 9
    for name, values in vars(found).items():
        np.testing.assert_array_equal(values, getattr(expected, name), err_msg=name)


def test_memory_per_detection_is_flat():
    _, found = noisy(images=10, per_image=10, classes=2)
    joined = Detections.join([found] * 5)
    assert sum(array.nbytes for array in vars(joined).values()) == 36 * 500
