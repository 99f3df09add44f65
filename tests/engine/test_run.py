"""The images that a command trains and evaluates on; options without effect are refused."""

import json
import shutil
from dataclasses import asdict

import pytest

import conddetr
from conddetr.cli import main
from conddetr.config.run import DataConfig
from conddetr.data.synthetic import CLASSES
from conddetr.engine.run import data_sets, evaluation_set, official_evaluation

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")

MODEL = conddetr.config.resolve("conditional-detr-tiny", image_size=64, max_image_size=96)
SHAPES = [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)]
QUICK = ("--preset", "conditional-detr-tiny", "--image-size", "64", "--max-image-size", "96", "--workers", "0")


@pytest.fixture
def folder(small_coco):
    """Options for one annotation file with ten images."""
    for index in range(4, 10):
        shutil.copy(small_coco.images / "0.jpg", small_coco.images / f"{index}.jpg")
        small_coco.content["images"].append(
            {**small_coco.content["images"][0], "id": 100 + index, "file_name": f"{index}.jpg"}
        )
        small_coco.annotate(100 + index, [10, 5, 30, 40], 3)
    small_coco.write()
    return {"images": str(small_coco.images), "annotations": str(small_coco.file)}


@pytest.fixture
def own(small_coco):
    """Options for a separate validation file with two images."""
    file = small_coco.root / "annotations" / "instances_val2017.json"
    return {"val_annotations": str(file), "val_folder": str(small_coco.root / "val2017")}


OWN_FILE = DataConfig(annotations="x", images="y", val_annotations="z", val_folder="f")


def evaluated(chosen, training_data=None):
    return evaluation_set(chosen, training_data, SHAPES, MODEL)


def test_all_images_of_a_named_file_are_evaluated(folder, own):
    assert len(evaluated(folder)) == 10
    assert evaluated(folder).source == folder["annotations"]
    assert evaluated(own).image_ids == [100, 101]
    assert evaluated({"val_annotations": own["val_annotations"], "images": own["val_folder"]}).image_ids == [100, 101]
    # Independent of the detector's training data.
    for training_data in (DataConfig(), DataConfig(coco_path="/nowhere"), DataConfig(**folder)):
        assert evaluated(own, training_data).source == own["val_annotations"]
        assert len(evaluated(folder, training_data)) == 10


def test_held_out_images_are_described_as_a_part(folder):
    _, val_set = data_sets(DataConfig(**folder, val_fraction=0.3), MODEL)
    assert len(val_set) == 3
    for part in (
        evaluated({}, DataConfig(**folder, val_fraction=0.3)),
        evaluated({"val_fraction": 0.3}, DataConfig(**folder)),
        evaluated({**folder, "val_fraction": 0.3}),
    ):
        assert part.image_ids == val_set.image_ids
        assert part.source == f"3 of the 10 images of {folder['annotations']}"


def test_validation_file_of_the_training_is_the_default(folder, own):
    training_data = DataConfig(**folder, **own)
    assert evaluated({}, training_data).source == own["val_annotations"]
    assert data_sets(training_data, MODEL)[1].source == own["val_annotations"]


def test_validation_images_may_have_moved(folder, own, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(own["val_folder"], moved)
    training_data = DataConfig(**folder, **own)
    assert evaluated({"val_folder": str(moved)}, training_data).image_dir == moved
    one_folder = DataConfig(**folder, val_annotations=own["val_annotations"])
    for name in ("images", "val_folder"):
        assert evaluated({name: str(moved)}, one_folder).image_dir == moved


def test_val_fraction_is_refused_for_a_data_set_with_validation_images(small_coco):
    root = str(small_coco.root)
    message = "val_fraction has no effect, because .* has validation images"
    with pytest.raises(ValueError, match=message):
        data_sets(DataConfig(dataset=root, val_fraction=0.3), MODEL)
    with pytest.raises(ValueError, match=message):
        evaluated({"dataset": root, "val_fraction": 0.1})
    with pytest.raises(ValueError, match=message):
        evaluated({"val_fraction": 0.3}, DataConfig(dataset=root))
    shutil.rmtree(small_coco.root / "val2017")
    part = evaluated({"dataset": root, "val_fraction": 0.5})
    assert part.source == f"2 of the 4 images of {small_coco.file}"
    assert part.image_ids == data_sets(DataConfig(dataset=root, val_fraction=0.5), MODEL)[1].image_ids


def test_official_evaluation_uses_the_options_of_the_training(folder, own):
    files = DataConfig(**folder, **own)
    # As from a run's configuration file, which names every option.
    assert evaluated(official_evaluation(files, asdict(files))).source == own["val_annotations"]
    part = DataConfig(**folder, val_fraction=0.3)
    assert len(evaluated(official_evaluation(part, asdict(part)))) == 3
    assert len(evaluated(official_evaluation(DataConfig(**folder), folder))) == 10
    assert official_evaluation(DataConfig(), asdict(DataConfig())) == {}
    with pytest.raises(ValueError, match="val_images has no effect with `coco_path`"):
        official_evaluation(DataConfig(coco_path="x", val_images=3), ["coco_path", "val_images"])


def test_data_set_with_a_detected_layout(small_coco):
    data = DataConfig(dataset=str(small_coco.root))
    train_set, val_set = data_sets(data, MODEL)
    assert (len(train_set), len(val_set)) == (4, 2)
    assert evaluated({"dataset": str(small_coco.root)}).image_ids == val_set.image_ids
    assert evaluated({}, data).image_ids == val_set.image_ids
    assert evaluated({"coco_path": str(small_coco.root)}).image_ids == val_set.image_ids


def test_test_split_of_a_data_set(small_coco, capsys):
    (small_coco.root / "roboflow" / "train").mkdir(parents=True)
    shutil.copytree(small_coco.images, small_coco.root / "roboflow" / "test")
    for name in ("train", "test"):
        shutil.copy(small_coco.file, small_coco.root / "roboflow" / name / "_annotations.coco.json")
    chosen = {"dataset": str(small_coco.root / "roboflow")}
    test_set = evaluation_set(chosen, None, SHAPES, MODEL, "test")
    assert test_set.source == f"{small_coco.root}/roboflow/test/_annotations.coco.json"
    assert "data: Roboflow COCO layout (train/_annotations.coco.json): train, test" in capsys.readouterr().out
    with pytest.raises(ValueError, match="split has no effect with `coco_path`"):
        evaluation_set({"coco_path": str(small_coco.root)}, None, SHAPES, MODEL, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "x"}, "annotations is missing"),
        ({"val_folder": "x"}, "annotations is missing"),
        ({"annotations": "x"}, "images is missing"),
        ({"annotations": "x", "images": "y", "val_folder": "z"}, "val_annotations is missing"),
        ({"annotations": "x", "images": "y", "coco_path": "z"}, "coco_path and annotations: give one of them"),
        ({"dataset": "x", "coco_path": "z"}, "dataset and coco_path: give one of them"),
        ({"coco_path": "x", "images": "y"}, "images has no effect with `coco_path`"),
        ({"coco_path": "x", "val_annotations": "y"}, "val_annotations has no effect with `coco_path`"),
        ({"coco_path": "x", "val_fraction": 0.2}, "val_fraction has no effect with `coco_path`"),
        ({"coco_path": "x", "val_images": 7}, "val_images has no effect with `coco_path`"),
        ({"dataset": "x", "val_folder": "y"}, "val_folder has no effect with `dataset`"),
        ({"val_fraction": 0.2}, "val_fraction has no effect with synthetic shapes"),
        ({"annotations": "x", "images": "y", "train_images": 8}, "train_images has no effect with `annotations`"),
        (
            {"annotations": "x", "images": "y", "val_annotations": "z", "val_fraction": 0.2},
            "val_fraction has no effect with `val_annotations`",
        ),
        ({"val_fraction": 1.5}, r"val_fraction: expected a value between 0 and 1, got 1\.5"),
    ],
)
def test_training_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        data_sets(DataConfig(**options), MODEL)


@pytest.mark.parametrize(
    ("chosen", "training_data", "message"),
    [
        ({"images": "x"}, None, "annotations is missing"),
        ({"images": "x"}, DataConfig(), "annotations is missing"),
        ({"coco_path": "x", "val_annotations": "y"}, None, "coco_path has no effect with `val_annotations`"),
        (
            {"annotations": "x", "images": "y", "val_annotations": "z"},
            None,
            "annotations has no effect with `val_annotations`",
        ),
        ({"coco_path": "x", "val_fraction": 0.1}, None, "val_fraction has no effect with `coco_path`"),
        # These options would be ignored.
        ({"images": "x"}, DataConfig(coco_path="x"), "images has no effect with `coco_path`"),
        ({"images": "x"}, DataConfig(dataset="x"), "images has no effect with `dataset`"),
        ({"images": "x"}, OWN_FILE, "images has no effect with `annotations`"),
        ({"val_fraction": 0.1}, OWN_FILE, "val_fraction has no effect with `val_annotations`"),
        ({"val_images": 7}, DataConfig(coco_path="x"), "val_images has no effect with `coco_path`"),
        ({"val_fraction": 0.1}, DataConfig(), "val_fraction has no effect with synthetic shapes"),
        ({"val_annotations": "x"}, DataConfig(), "images is missing"),
        ({"annotation": "x"}, None, r"Unknown data option 'annotation'\. Did you mean 'annotations'"),
    ],
)
def test_evaluation_options_without_effect_are_refused(chosen, training_data, message):
    with pytest.raises(ValueError, match=message):
        evaluated(chosen, training_data)


def test_splits_with_different_categories_are_refused(small_coco, own):
    content = json.loads((small_coco.root / "annotations" / "instances_val2017.json").read_text())
    content["categories"][0]["name"] = "lion"
    (small_coco.root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="id 7 is 'cat' in the training set and 'lion' in the validation set"):
        data_sets(DataConfig(coco_path=str(small_coco.root)), MODEL)


def test_training_set_without_objects_is_refused_with_counts(small_coco, tmp_path, capsys):
    for annotation in small_coco.content["annotations"]:
        annotation["iscrowd"] = 1
    small_coco.annotate(100, [500, 500, 5, 5], 7)
    small_coco.write()
    command = ["train", "--coco-path", str(small_coco.root), *QUICK, "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert "There is nothing to learn" in printed
    assert "4 crowds (`iscrowd` 1, which are not trained on) and 1 boxes without" in printed
    assert "1 boxes without area inside their image" in printed
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([], "no boxes at all, and no other objects. Check that the export includes annotations."),
        ([500, 500, 5, 5], "1 boxes without area inside their image, and no other objects. conddetr validate-data"),
    ],
)
def test_error_for_nothing_to_learn_has_only_the_causes_that_apply(small_coco, annotations, message):
    small_coco.content["annotations"] = []
    if annotations:
        small_coco.annotate(100, annotations, 7)
    small_coco.write()
    with pytest.raises(ValueError, match="There is nothing to learn") as caught:
        data_sets(DataConfig(coco_path=str(small_coco.root)), MODEL)
    assert message in str(caught.value)
    assert "crowd" not in str(caught.value)


def test_warning_for_validation_images_that_are_also_training_images(small_coco, caplog):
    data_sets(DataConfig(coco_path=str(small_coco.root)), MODEL)
    assert not caplog.records
    file = str(small_coco.root / "annotations" / "instances_train2017.json")
    # The same folder under another name.
    folder = str(small_coco.root / "annotations" / ".." / "train2017")
    same = {"images": str(small_coco.root / "train2017"), "annotations": file, "val_annotations": file}
    train_set, _ = data_sets(DataConfig(**same, val_folder=folder), MODEL)
    count = len(train_set)
    assert f"{count} of the {count} validation images are training images too" in caplog.text


def test_validation_set_without_objects_gives_undefined_metrics(small_coco, tmp_path, capsys, caplog):
    file = small_coco.root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "annotations": []}))
    command = ["train", "--coco-path", str(small_coco.root), *QUICK, "--device", "cpu", "--batch-size", "4"]
    assert main([*command, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert f"There is nothing to measure: {file} has no objects (0 crowds)" in caplog.text
    assert not (tmp_path / "run" / "best.pt").exists()
    assert "AP –  AP50 –" in printed
    assert f"{file}: 2 images, 0 objects; by " in printed
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text())["AP"] == -1


def test_test_set_without_annotations_gives_detections_and_no_metrics(small_coco, tmp_path, tiny_model, capsys):
    classes = sorted(small_coco.categories, key=lambda category: category["id"])
    detector = conddetr.Detector(tiny_model, classes, "cpu")
    checkpoint = detector.save(tmp_path / "x.pt")
    del small_coco.content["annotations"]
    small_coco.write()
    command = ["eval", "--checkpoint", str(checkpoint), "--images", str(small_coco.images)]
    command += ["--annotations", str(small_coco.file), "--workers", "0", "--device", "cpu"]
    assert main(command) == 2
    assert "--results FILE writes the detections" in capsys.readouterr().err
    assert main([*command, "--results", str(tmp_path / "results.json")]) == 0
    assert {row["image_id"] for row in json.loads((tmp_path / "results.json").read_text())} == {100, 101, 102, 103}
    assert "has no annotations: there are no metrics." in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing to compare detections with"):
        detector.evaluate(workers=0, images=str(small_coco.images), annotations=str(small_coco.file))
