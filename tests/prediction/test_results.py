"""Files of detections, read back by other programs."""

import csv
import json
import signal

import pytest
import torch

from conddetr import interrupt
from conddetr.data.annotations import read_annotations
from conddetr.detection import Detection, Frame, Prediction
from conddetr.prediction.results import (
    COLUMNS,
    CocoDatasetFile,
    CsvFile,
    ImageIds,
    check_target,
    common_folder,
    write_coco,
    write_csv,
)

CLASSES = [{"id": 3, "name": "dog"}, {"id": 7, "name": 'cat, "wild"'}, {"id": 90, "name": "信号灯"}]


def prediction(source, index, count):
    """An image of 50 × 80 pixels with `count` objects."""
    generator = torch.Generator().manual_seed(index)
    labels = torch.randint(0, 3, (count,), generator=generator)
    corners = 40 * torch.rand(count, 2, generator=generator)
    boxes = torch.cat([corners, corners + 5], 1)
    scores = torch.rand(count, generator=generator)
    names = [CLASSES[label]["name"] for label in labels]
    detection = Detection(scores, labels, boxes, torch.arange(count), names)
    return Prediction(source, index, torch.zeros(3, 50, 80, dtype=torch.uint8), detection)


@pytest.fixture
def predictions():
    frame = Frame("clip.mp4", 12, 0.48, torch.zeros(3, 50, 80, dtype=torch.uint8))
    unreadable = Prediction("d/broken.jpg", 2, error=ValueError("broken"))
    images = [prediction("d/a.jpg", 0, 2), prediction("d/e/b.jpg", 1, 0), unreadable]
    return [*images, prediction(frame, 3, 3), prediction(torch.zeros(1), 4, 1)]


def test_csv_is_read_back(predictions, tmp_path):
    path = write_csv(tmp_path / "new" / "a.csv", predictions)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["image"] for row in rows] == ["d/a.jpg"] * 2 + ["clip.mp4"] * 3 + ["4"]
    assert [(row["frame"], row["time"]) for row in rows] == [("", "")] * 2 + [("12", "0.480")] * 3 + [("", "")]
    expected = [one.result for one in predictions if one.result is not None]
    assert [row["class"] for row in rows] == [name for one in expected for name in one.names]
    scores, boxes = (torch.cat([getattr(one, name) for one in expected]).flatten() for name in ("scores", "boxes"))
    assert [float(row["score"]) for row in rows] == pytest.approx(scores.tolist(), abs=1e-6)
    assert [float(row[side]) for row in rows for side in COLUMNS[-4:]] == pytest.approx(boxes.tolist(), abs=0.005)


def test_data_set_is_read_back(predictions, tmp_path):
    coco = pytest.importorskip("pycocotools.coco", reason="reads COCO's format")
    data = coco.COCO(str(write_coco(tmp_path / "a.json", predictions, CLASSES)))
    names = ["d/a.jpg", "d/e/b.jpg", "clip.mp4#12", "4"]
    assert [data.imgs[number]["file_name"] for number in (1, 2, 3, 4)] == names
    assert (data.imgs[3]["video"], data.imgs[3]["frame"], data.imgs[3]["time"]) == ("clip.mp4", 12, 0.48)
    assert all((image["height"], image["width"]) == (50, 80) for image in data.imgs.values())
    assert {number: category["name"] for number, category in data.cats.items()} == {
        category["id"]: category["name"] for category in CLASSES
    }
    results = [one.result for one in predictions if one.result is not None]
    for image_id, result in enumerate(results, 1):
        objects = data.imgToAnns[image_id]
        assert [entry["score"] for entry in objects] == pytest.approx(result.scores.tolist())
        assert [entry["category_id"] for entry in objects] == [CLASSES[label]["id"] for label in result.labels]
        for entry, (x0, y0, x1, y1) in zip(objects, result.boxes.tolist(), strict=True):
            assert entry["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-4)
            assert entry["area"] == pytest.approx(25, abs=1e-3)
    # Our reader of data sets reads it too.
    assert len(read_annotations(tmp_path / "a.json")) == 4


def test_names_that_are_not_unicode_are_written(tmp_path):
    """Linux allows any bytes in the name of a file."""
    name = "caf\udce9.jpg"
    write_coco(tmp_path / "a.json", [prediction(name, 0, 1)], CLASSES)
    [image] = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["images"]
    assert image["file_name"] == name
    write_csv(tmp_path / "a.csv", [prediction(name, 0, 1)])
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()[1].startswith(r"caf\udce9.jpg,")


def test_empty_files_are_valid(tmp_path):
    write_csv(tmp_path / "a.csv", [])
    assert (tmp_path / "a.csv").read_text() == ",".join(COLUMNS) + "\n"
    write_coco(tmp_path / "a.json", [], CLASSES)
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (content["images"], content["annotations"]) == ([], [])


def test_results_have_the_ids_of_the_annotations(small_coco, tmp_path):
    coco = pytest.importorskip("pycocotools.coco", reason="reads COCO's format")
    classes = small_coco.categories
    predictions = [prediction(small_coco.images / f"{index}.jpg", index, 2) for index in (2, 0)]
    path = write_coco(tmp_path / "a.json", predictions, list(classes), small_coco.file)
    results = coco.COCO(str(small_coco.file)).loadRes(str(path))
    assert {entry["image_id"] for entry in results.anns.values()} == {100, 102}
    assert [entry["category_id"] for entry in results.imgToAnns[102]] == [
        classes[label]["id"] for label in predictions[0].result.labels
    ]


def test_an_image_id_is_that_of_the_longest_matching_name(small_coco):
    for image, name in zip(small_coco.content["images"], ("a.jpg", "x/a.jpg", "y/b.jpg", "c.jpg"), strict=True):
        image["file_name"] = name
    small_coco.write()
    ids = ImageIds(read_annotations(small_coco.file))
    assert [ids.of(name) for name in ("/data/x/a.jpg", "a.jpg", "z/y/b.jpg", "a.jpg")] == [101, 100, 102, 100]
    with pytest.raises(ValueError, match=r"no image has the file name z/b\.jpg: its results need an image id"):
        ids.of("z/b.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg and z/a\.jpg are both the image with id 100"):
        ids.of("z/a.jpg")


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_an_interruption_leaves_a_valid_file_of_what_was_done(name, predictions, tmp_path):
    def interrupted():
        yield from predictions[:2]
        raise KeyboardInterrupt

    path, whole = tmp_path / name, tmp_path / f"whole-{name}"
    for target, stream in ((path, interrupted()), (whole, predictions[:2])):
        write = write_csv if name.endswith("csv") else lambda *args: write_coco(*args, CLASSES)
        if target == path:
            with pytest.raises(KeyboardInterrupt):
                write(target, stream)
        else:
            write(target, stream)
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, whole.name])


def test_an_interruption_within_a_part_waits_for_its_end(predictions, tmp_path, default_interrupt_handler):
    """A signal arrives in the middle of each part; the part is whole nevertheless."""

    class Interrupted(CocoDatasetFile):
        def _append(self, entries):
            signal.raise_signal(signal.SIGINT)
            super()._append(entries)

    with pytest.raises(KeyboardInterrupt), Interrupted(tmp_path / "a.json", CLASSES) as file:
        file.add(predictions[0])
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (len(content["images"]), len(content["annotations"])) == (1, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with interrupt.deferred():
        pass


def test_a_file_that_cannot_be_written_keeps_its_old_content(predictions, tmp_path):
    path = write_csv(tmp_path / "a.csv", predictions)
    before = path.read_bytes()
    with pytest.raises(OSError, match="no space"), CsvFile(path) as file:
        file._stack.callback(raise_full)
    assert path.read_bytes() == before
    assert not file.is_complete
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


def raise_full():
    raise OSError("no space")


def test_targets_are_checked_before_the_work(tmp_path, predictions):
    for name, content in (("a.csv", "x,y\n"), ("a.json", "hello")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=r"^--results .*the file exists and is"):
            check_target("--results", tmp_path / name)
    for name in ("a", "a.txt"):
        with pytest.raises(ValueError, match=r"expected a name ending in \.json or \.csv"):
            check_target("--results", tmp_path / name)
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(ValueError, match="got a folder"):
        check_target("--results", tmp_path / "b.csv")
    for path in (write_csv(tmp_path / "c.csv", predictions), write_coco(tmp_path / "c.json", predictions, CLASSES)):
        check_target("--results", path)


def test_names_are_relative_to_the_common_folder(tmp_path):
    paths = [tmp_path / "d" / "a.jpg", tmp_path / "d" / "e" / "b.jpg"]
    assert common_folder(paths) == str(tmp_path / "d")
    assert common_folder([*map(type(paths[0]), ("a.jpg", "x/b.jpg"))]) == "."
    assert common_folder([]) is None
    assert common_folder([paths[0], type(paths[0])("a.jpg")]) is None
    with CocoDatasetFile(tmp_path / "a.json", CLASSES, common_folder(paths)) as file:
        for index, path in enumerate(paths):
            file.add(prediction(path, index, 1))
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "e/b.jpg"]
    assert content["info"]["folder"] == str(tmp_path / "d")
