"""Every command, on synthetic and on real images."""

import argparse
import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from golden_rule import rule_model
from PIL import Image
from small_runs import command_line, finish, start_ranks

from conddetr.cli import main
from conddetr.commands import evaluate
from conddetr.commands.demo import check_learned, recipe_for_shapes
from conddetr.config import Backend, resolve
from conddetr.config.flags import add_options, chosen_options
from conddetr.config.run import option_help, read_config, resolve_run
from conddetr.data.synthetic import SyntheticShapes
from conddetr.engine.coco_metrics import METRICS, Detections
from conddetr.engine.progress import console
from conddetr.kernels import registry
from conddetr.prediction.video import Video
from conddetr.viz.pictures import PictureFolder

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")

QUICK = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert main(["train", *QUICK, "--train-images", "8", "--val-images", "4", "--out", str(out)]) == 0
    return out


def test_train_writes_checkpoint_and_log(trained):
    assert (trained / "checkpoint.pt").is_file()
    assert json.loads((trained / "log.jsonl").read_text())["epoch"] == 0


def test_training_survives_output_in_latin_1(tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    # Shapes of this size have no large ones, whose AP is a dash.
    assert main(["train", *QUICK, "--train-images", "4", "--val-images", "2", "--out", str(tmp_path)]) == 0
    printed = stream.buffer.getvalue().decode("latin-1").splitlines()
    assert any(line.endswith(" -|") for line in printed), printed[-5:]


def test_eval_prints_and_writes_the_metrics(trained, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    command = ["eval", "--checkpoint", str(trained / "checkpoint.pt"), "--workers", "0", "--out", str(out)]
    assert main(command) == 0
    written = json.loads(out.read_text())
    objects = len(SyntheticShapes(4, 2).ground_truth()["annotations"])
    data = written.pop("data")
    assert (data["source"], data["images"], data["objects"]) == ("synthetic shapes of seed 2", 4, objects)
    assert data["library"].partition(" ")[0] in ("faster-coco-eval", "pycocotools")
    assert tuple(written) == METRICS
    printed = capsys.readouterr().out
    assert "AP50" in printed
    assert f"synthetic shapes of seed 2: 4 images, {objects} objects; by {data['library']}" in printed
    # If the file cannot be written, the metrics are still printed.
    assert main([*command[:-1], str(out / "metrics.json")]) == 2
    assert "AP50" in capsys.readouterr().out
    results = tmp_path / "results.json"
    assert main([*command, "--results", str(results), "--per-class"]) == 0
    assert {"image_id", "category_id", "bbox", "score"} == set(json.loads(results.read_text())[0])
    assert [row["name"] for row in json.loads(out.read_text())["per_class"]] == ["disk", "square", "triangle"]
    assert "triangle" in capsys.readouterr().out


def test_eval_writes_a_report_beside_the_checkpoint_or_to_a_file(trained, tmp_path, capsys):
    shutil.copy(trained / "checkpoint.pt", tmp_path / "checkpoint.pt")
    command = ["eval", "--checkpoint", str(tmp_path / "checkpoint.pt"), "--workers", "0", "--device", "cpu"]
    assert main([*command, "--report"]) == 0
    assert f"wrote {tmp_path / 'report.html'}" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "checkpoint.pt") in page
    assert "synthetic shapes of seed 2" in page
    # The older one is replaced.
    (tmp_path / "report.html").write_text(page[: len(page) // 2])
    assert main([*command, "--report", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").read_text() == page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "report.html"]


def test_report_without_annotations_is_an_error_before_the_evaluation(trained, small_coco, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "detect", lambda *_, **__: pytest.fail("detected"))
    small_coco.content["categories"] = SyntheticShapes(1, 1).classes
    del small_coco.content["annotations"]
    small_coco.write()
    data = ["--images", str(small_coco.images), "--annotations", str(small_coco.file)]
    report, results = small_coco.root / "report.html", small_coco.root / "results.json"
    command = ["eval", "--checkpoint", str(trained / "checkpoint.pt"), "--device", "cpu", *data]
    assert main([*command, "--report", str(report), "--results", str(results)]) == 2
    errors = capsys.readouterr().err
    assert "has no list 'annotations', so there is nothing to compare detections with" in errors
    assert "--results FILE without --report writes the detections" in errors
    assert not report.exists()
    assert not results.exists()


def test_two_processes_give_the_metrics_of_one(trained, tmp_path):
    command = ["--device", "cpu", "--val-images", "7", "--batch-size", "2", "--workers", "0"]
    command = ["eval", "--checkpoint", str(trained / "checkpoint.pt"), *command]
    assert (
        main([*command, "--out", str(tmp_path / "one.json"), "--results", str(tmp_path / "one-detections.json")]) == 0
    )
    outputs = ["--out", str(tmp_path / "two.json"), "--results", str(tmp_path / "two-detections.json")]
    outputs += ["--report", str(tmp_path / "two.html")]
    finish(*start_ranks(2, command_line, tmp_path, [*command, *outputs]))
    metrics, metrics_of_two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert metrics_of_two.pop("data") == metrics.pop("data")
    assert metrics_of_two == pytest.approx(metrics, abs=1e-6)
    single, double = [json.loads((tmp_path / f"{name}-detections.json").read_text()) for name in ("one", "two")]
    assert [detection["image_id"] for detection in double] == [detection["image_id"] for detection in single]
    assert len({detection["image_id"] for detection in single}) == 7
    assert "AP50" in (tmp_path / "printed-0").read_text()
    assert f"wrote {tmp_path / 'two.html'}" in (tmp_path / "printed-0").read_text()
    assert (tmp_path / "printed-1").read_text() == ""

    official = ["train", "--eval", "--resume", str(trained / "checkpoint.pt"), "--device", "cpu", "--val-images", "7"]
    finish(*start_ranks(2, command_line, tmp_path, official))
    assert "AP50" in (tmp_path / "printed-0").read_text()
    assert (tmp_path / "printed-1").read_text() == ""


def test_official_evaluation_reads_dilation_from_its_flag(small_coco, tmp_path, monkeypatch):
    file = tmp_path / "official.pth"
    # Without stored arguments nothing in the file shows DC5.
    torch.save({"model": rule_model("conditional-detr-dc5-r50").state_dict()}, file)
    models, precisions = [], []

    def detect(model, *_, by_name, precision):
        models.append(model)
        precisions.append(precision)
        return Detections.join(())

    monkeypatch.setattr(evaluate, "detect", detect)
    command = ["train", "--eval", "--resume", str(file), "--coco_path", str(small_coco.root), "--device", "cpu"]
    assert main([*command, "--dilation"]) == 0
    assert main(command) == 0
    assert [model.config.dilation for model in models] == [True, False]
    # Official flags mean float32; `auto` on this GPU would mean bfloat16.
    monkeypatch.setattr("conddetr.detector.has_bfloat16", lambda device: True)
    assert main([*command, "--precision", "auto", "--backend", "eager"]) == 0
    assert precisions == ["float32", "float32", "bfloat16"]
    assert [model.backend for model in models] == ["auto", "auto", "eager"]


def test_predict_draws_a_picture(trained, tmp_path):
    image = tmp_path / "gray.png"
    Image.new("L", (70, 50), 128).save(image)
    command = ["predict", str(image), "--checkpoint", str(trained / "checkpoint.pt"), "--threshold", "0"]
    assert main([*command, "--out", str(tmp_path / "drawn")]) == 0
    with Image.open(tmp_path / "drawn" / "gray.png") as drawn:
        assert drawn.width > drawn.height >= 300


@pytest.fixture
def predict(trained, tmp_path, monkeypatch, capsys):
    """Runs `predict` in an empty folder; returns exit status, standard output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["predict", *arguments, "--checkpoint", str(trained / "checkpoint.pt"), "--device", "cpu"])
        return status, *capsys.readouterr()

    return run


def write_image(path, gray):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (gray, gray, gray)).save(path)
    return path


def grays(folder):
    """The middle pixel of every picture in a folder."""
    values = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            values[path.name] = image.convert("L").getpixel((image.width // 2, image.height // 2))
    return values


def test_pictures_of_images_with_equal_names_are_all_kept(predict, tmp_path):
    images = [
        write_image(tmp_path / name, gray) for name, gray in (("a/1.png", 50), ("b/1.png", 100), ("c/1.bmp", 150))
    ]
    names = [str(image.relative_to(tmp_path)) for image in images]
    status, printed, _ = predict(*names, "--out", "drawn", "--threshold", "1")
    assert status == 0
    assert printed.splitlines()[3] == "c/1.bmp: 0 objects; wrote drawn/1-3.png"
    expected = {"1-2.png": 100, "1-3.png": 150, "1.png": 50}
    assert grays(tmp_path / "drawn") == expected
    # Again in another order, and one image alone: each picture keeps its name.
    assert predict(*reversed(names), "--out", "drawn", "--threshold", "1")[0] == 0
    write_image(tmp_path / "b/1.png", 200)
    assert predict("b/1.png", "--out", "drawn", "--threshold", "1")[0] == 0
    assert grays(tmp_path / "drawn") == {**expected, "1-2.png": 200}


def test_predict_overwrites_no_other_files(predict, tmp_path):
    image = write_image(tmp_path / "in/photo.png", 50)
    before = image.read_bytes()
    (tmp_path / "link").symlink_to("in")
    for out in ("in", "link", "."):
        assert predict("in/photo.png", "--out", out, "--threshold", "1")[0] == 0
    assert image.read_bytes() == before
    assert sorted(path.name for path in image.parent.iterdir()) == ["photo-2.png", "photo.png"]
    # A picture by another program, a link, a folder, and a picture by `predict` that is now an input.
    out = tmp_path / "out"
    others = write_image(out / "photo.png", 60).read_bytes()
    (out / "photo-2.png").symlink_to(image)
    (out / "photo-3.png").mkdir()
    assert predict("in/photo.png", "--out", "out", "--threshold", "1")[0] == 0
    drawn = (out / "photo-4.png").read_bytes()
    assert predict("in/photo.png", "out/photo-4.png", "--out", "out", "--threshold", "1")[0] == 0
    assert sorted(path.name for path in out.iterdir() if path.is_file() and not path.is_symlink()) == [
        "photo-4-2.png",
        "photo-4.png",
        "photo-5.png",
        "photo.png",
    ]
    assert (out / "photo-4.png").read_bytes() == drawn
    assert (out / "photo.png").read_bytes() == others
    assert image.read_bytes() == before


def test_predict_on_a_folder_draws_its_images(predict, tmp_path):
    for name in ("b.PNG", "a.jpg", "inside/c.png"):
        write_image(tmp_path / "photos" / name, 50)
    (tmp_path / "photos/notes.txt").write_text("not an image")
    (tmp_path / "photos/._a.jpg").write_bytes(b"of another system")
    status, printed, errors = predict("photos", "--out", "photos", "--threshold", "1")
    assert (status, errors) == (0, "")
    assert [line.split(":")[0] for line in printed.splitlines()[:-1]] == ["attention", "photos/a.jpg", "photos/b.PNG"]
    assert re.fullmatch(
        r"2 images, 0 objects, 0 unreadable; [\d.]+ images/s \(reading, model, drawing\)", printed.splitlines()[-1]
    )
    # Pictures that `predict` drew are not input images.
    before = sorted(path.name for path in (tmp_path / "photos").iterdir())
    status, printed, _ = predict("photos", "--out", "photos", "--threshold", "1")
    assert printed.splitlines()[0] == "photos: of 4 images, 2 drawn by predict are skipped"
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == before
    (tmp_path / "empty").mkdir()
    status, _, errors = predict("empty", "--out", "drawn")
    assert status == 2
    assert "Folder empty contains no image: 0 files. Subfolders are not searched." in errors


def test_images_are_drawn_despite_a_damaged_one(predict, tmp_path):
    for name in ("a.png", "c.png"):
        write_image(tmp_path / name, 50)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    status, printed, errors = predict("a.png", "b.png", "c.png", "--out", "drawn", "--threshold", "1")
    assert status == 2
    assert list(grays(tmp_path / "drawn")) == ["a.png", "c.png"]
    assert [line.split(":")[0] for line in printed.splitlines()[:-1]] == ["attention", "a.png", "b.png", "c.png"]
    assert printed.splitlines()[-1].startswith("2 images, 0 objects, 1 unreadable; ")
    assert "1 of 3 inputs cannot be read, first: Image file b.png" in errors
    status, printed, errors = predict("b.png", "--out", "drawn")
    assert (status, len(printed.splitlines())) == (2, 2)
    assert errors.startswith("conddetr predict: Image file b.png: ")


def test_paths_are_used_and_printed_unchanged(predict, tmp_path):
    for name in ("photo [copy].png", "[bold]/p.png", "x[/y]/p.png"):
        write_image(tmp_path / name, 50)
        status, printed, _ = predict(name, "--out", f"{name}[/b]", "--threshold", "1")
        assert status == 0
        assert f"{name}: 0 objects; wrote {name}[/b]/" in printed


def write_video(path, count=6):
    """A video of gray frames; skips the test without OpenCV."""
    cv2 = pytest.importorskip("cv2", reason="videos need OpenCV (pip install 'conddetr[video]')")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 48))
    for index in range(count):
        writer.write(np.full((48, 64, 3), 10 * index, np.uint8))
    writer.release()
    return path


def test_predict_writes_the_objects_of_images_and_videos(predict, tmp_path):
    write_image(tmp_path / "photos/a.png", 50)
    write_video(tmp_path / "clip.avi")
    files = ["--results", "objects.csv", "--results", "objects.json"]
    options = ["--threshold", "0", "--top-k", "3", "--batch-size", "2", "--every", "2", "--out", "drawn"]
    status, printed, errors = predict("photos/a.png", "clip.avi", *files, *options)
    assert (status, errors) == (0, "")
    lines = printed.splitlines()
    assert lines[1:5] == [
        "photos/a.png: 3 objects; wrote drawn/a.png",
        "clip.avi: 3 frames, 9 objects; wrote drawn/clip.mp4",
        "wrote objects.csv",
        "wrote objects.json",
    ]
    assert lines[5].startswith("4 images and frames, 12 objects, 0 unreadable; ")
    with open("objects.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    places = [("photos/a.png", "", "")] + [("clip.avi", str(index), f"{index / 5:.3f}") for index in (0, 2, 4)]
    assert [(row["image"], row["frame"], row["time"]) for row in rows[::3]] == places
    content = json.loads((tmp_path / "objects.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.png", "clip.avi#0", "clip.avi#2", "clip.avi#4"]
    assert [entry["score"] for entry in content["annotations"]] == pytest.approx(
        [float(row["score"]) for row in rows], abs=1e-6
    )
    with Video(tmp_path / "drawn/clip.mp4") as drawn:
        assert [frame.image.shape for frame in drawn] == [(3, 48, 64)] * 3
    # Again: the drawn video is replaced, as pictures are; another one of the same name is not.
    assert predict("clip.avi", *options)[1].splitlines()[1].endswith("wrote drawn/clip.mp4")
    (tmp_path / "other").mkdir()
    write_video(tmp_path / "other/clip.avi")
    assert predict("other/clip.avi", *options)[1].splitlines()[1].endswith("wrote drawn/clip-2.mp4")
    before = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert before == ["a.png", "clip-2.mp4", "clip.mp4"]
    status, printed, _ = predict("clip.avi", "--no-pictures", "--max-frames", "4")
    assert printed.splitlines()[1].startswith("clip.avi: 4 frames, ")
    assert printed.splitlines()[2].endswith(" images/s (reading, model)")
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == before


def test_predict_goes_on_after_a_damaged_video(predict, tmp_path):
    path = write_video(tmp_path / "clip.avi", 20)
    path.write_bytes(path.read_bytes()[: int(0.8 * path.stat().st_size)])
    write_image(tmp_path / "a.png", 50)
    status, printed, errors = predict("clip.avi", "a.png", "--results", "objects.csv", "--threshold", "1")
    assert status == 2
    assert re.search(r"inputs cannot be read, first: Video clip\.avi: truncated or damaged: \d+ of about 20", errors)
    assert "a.png: 0 objects; wrote" in printed
    assert re.search(r"clip\.avi: \d+ frames, 0 objects; wrote runs/predict/clip\.mp4", printed)
    assert "1 unreadable" in printed.splitlines()[-1]


def test_results_have_the_image_ids_of_annotations(predict, small_coco, tmp_path):
    files = ["--annotations", str(small_coco.file), "--results", "objects.json"]
    folder = str(small_coco.images)
    status, _, errors = predict(folder, *files, "--no-pictures")
    assert status == 2
    assert "Category id 3 is 'dog' in the data set and 'triangle' in the model" in errors
    names = ("triangle", "square", "disk")
    small_coco.content["categories"] = [{"id": 1 + index, "name": name} for index, name in enumerate(names)]
    small_coco.content["annotations"] = []
    small_coco.write()
    files += ["--classes-by-name"]
    assert predict(folder, *files, "--no-pictures", "--threshold", "0", "--top-k", "2")[0] == 0
    results = json.loads((tmp_path / "objects.json").read_text())
    assert [entry["image_id"] for entry in results] == [100, 100, 101, 101, 102, 102, 103, 103]
    assert predict(folder, "--results", "objects.csv", "--no-pictures", "--threshold", "0", "--top-k", "2")[0] == 0
    with open("objects.csv", newline="", encoding="utf-8") as file:
        assert [names[entry["category_id"] - 1] for entry in results] == [row["class"] for row in csv.DictReader(file)]
    write_image(tmp_path / "other.png", 50)
    status, _, errors = predict("other.png", *files)
    assert status == 2
    assert "no image has the file name other.png: its results need an image id" in errors


def test_an_interrupted_prediction_leaves_valid_files(predict, tmp_path, monkeypatch):
    for index in range(4):
        write_image(tmp_path / f"{index}.png", 50)
    save = PictureFolder.save_pixels

    def interrupted(self, pixels, image):
        if image.name == "2.png":
            raise KeyboardInterrupt
        return save(self, pixels, image)

    monkeypatch.setattr(PictureFolder, "save_pixels", interrupted)
    files = ["--results", "objects.csv", "--results", "objects.json"]
    names = [f"{index}.png" for index in range(4)]
    status, printed, errors = predict(*names, *files, "--threshold", "0", "--top-k", "1")
    assert (status, errors) == (130, "conddetr predict: interrupted.\n")
    assert printed.splitlines()[-1].startswith("3 images, 3 objects, 0 unreadable; ")
    assert printed.splitlines()[-3:-1] == ["wrote objects.csv", "wrote objects.json"]
    assert len(json.loads((tmp_path / "objects.json").read_text())["annotations"]) == 3
    assert len((tmp_path / "objects.csv").read_text().splitlines()) == 4


def test_ctrl_c_is_the_end_of_a_camera(predict, tmp_path, monkeypatch, default_interrupt_handler):
    cv2 = pytest.importorskip("cv2", reason="cameras need OpenCV (pip install 'conddetr[video]')")

    class Camera:
        """Sends Ctrl-C with its twentieth frame."""

        count = 0

        def isOpened(self):  # noqa: N802
            return True

        def get(self, _):
            return -1.0

        def read(self):
            self.count += 1
            if self.count == 20:
                os.kill(os.getpid(), signal.SIGINT)
            return self.count < 200, np.zeros((48, 64, 3), np.uint8)

        def release(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(cv2, "VideoCapture", lambda _: Camera())
        status, printed, errors = predict("camera:0", "--results", "objects.json", "--threshold", "0", "--top-k", "1")
    assert (status, errors) == (0, "")
    frames = int(re.search(r"^camera:0: (\d+) frames, \1 objects; wrote runs/predict/camera-0\.mp4$", printed, re.M)[1])
    assert 10 < frames < 40
    assert len(json.loads((tmp_path / "objects.json").read_text())["images"]) == frames
    with Video(tmp_path / "runs/predict/camera-0.mp4") as drawn:
        assert len(list(drawn)) >= frames


# On a null GPU all detections are of query 0.
@pytest.mark.gpu
@pytest.mark.compares_numbers.with_args(KeyError)
def test_attention_draws_a_picture_for_each_object(trained, tmp_path, capsys):
    image = tmp_path / "gray.png"
    Image.new("L", (90, 60), 128).save(image)
    command = ["attention", str(image), "--checkpoint", str(trained / "checkpoint.pt"), "--out", str(tmp_path / "maps")]
    assert main([*command, "--top", "2"]) == 0
    assert main([*command, "--query", "7", "--layer", "0"]) == 0
    files = sorted(file.name for file in (tmp_path / "maps").iterdir())
    assert files[0] == "gray-layer0-query7.png"
    assert [name.startswith("gray-layer1-query") for name in files] == [False, True, True]
    with Image.open(tmp_path / "maps" / files[0]) as drawn:
        assert drawn.width > 800
    # Another program's file of that name is kept.
    other = write_image(tmp_path / "maps" / "gray-layer0-query8.png", 50).read_bytes()
    assert main([*command, "--query", "8", "--layer", "0"]) == 0
    assert (tmp_path / "maps" / "gray-layer0-query8.png").read_bytes() == other
    assert (tmp_path / "maps" / "gray-layer0-query8-2.png").is_file()
    assert main([*command, "--layer", "2"]) == 2
    assert "layer: expected 0 to 1, or negative from the end, got 2" in capsys.readouterr().err


def test_export_writes_a_checked_file(trained, tmp_path, capsys):
    out = tmp_path / "model.pt2"
    command = ["export", "--checkpoint", str(trained / "checkpoint.pt"), "--format", "torch", "--out", str(out)]
    assert main([*command, "--size", "64", "96"]) == 0
    assert out.is_file()
    printed = capsys.readouterr().out
    assert "inputs: images [batch, 3, 64, 96] float32; outputs: logits, boxes\n" in printed
    assert "logits, and boxes in fractions of the image, differ from the model's by at most" in printed


def test_demo_on_synthetic_images(trained, tmp_path):
    earlier = tmp_path / "demo"
    shutil.copytree(trained, earlier)
    before = (earlier / "checkpoint.pt").read_bytes()
    threads = torch.get_num_threads()
    try:
        assert main(["demo", "--seconds", "1", "--out", str(earlier), "--device", "cpu"]) == 0
    finally:
        torch.set_num_threads(threads)
    # The demonstration does not overwrite an earlier run.
    assert (earlier / "checkpoint.pt").read_bytes() == before
    files = {file.name for file in (tmp_path / "demo-2").iterdir()}
    assert {"checkpoint.pt", "log.jsonl", "detections.png", "attention-0.png"} <= files


@pytest.mark.parametrize("gpus", [0, 2])
def test_more_processes_draw_shapes_on_a_gpu_machine(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert recipe_for_shapes("cpu")["workers"] == 1
    assert recipe_for_shapes(None)["workers"] == (2 if gpus else 1)
    if gpus:
        assert recipe_for_shapes("cuda:1")["workers"] == 2


def test_demo_that_did_not_learn_is_an_error(capsys):
    with pytest.raises(ValueError, match=r"AP50 84\.9 on held-out shapes: at least 85 is expected"):
        check_learned({"AP50": 0.849})
    with pytest.raises(ValueError, match="AP50 – on held-out shapes"):
        check_learned({"AP50": -1.0})
    check_learned({"AP50": 0.85})
    assert "the model has learned" in capsys.readouterr().out


@pytest.mark.slow
def test_real_images_through_every_command(coco_path, tmp_path):
    out = tmp_path / "run"
    data = ["--coco-path", str(coco_path)]
    tiny = ["--preset", "conditional-detr-tiny"]
    assert main(["train", *data, *tiny, *QUICK, "--time-limit", "5", "--out", str(out)]) == 0
    checkpoint = str(out / "checkpoint.pt")
    assert main(["train", *data, *tiny, "--resume", checkpoint, "--eval"]) == 0
    assert main(["eval", *data, "--checkpoint", checkpoint, "--workers", "0"]) == 0
    image = sorted((coco_path / "val2017").glob("*.jpg"))[0]
    assert main(["predict", str(image), "--checkpoint", checkpoint, "--out", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn" / f"{image.stem}.png").is_file()


def test_bench_data_prints_both_chains(coco_path, capsys):
    assert main(["bench-data", "--coco-path", str(coco_path), "--count", "4", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "official" in printed
    assert "no pixel differs by more than" in printed


def test_env_prints_backends_and_reasons(capsys):
    assert main(["env", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "native kernels: " in printed
    (row, *_) = [line for line in printed.splitlines() if "conditional_attention" in line]
    attention = registry.OPERATIONS["conditional_attention"]
    assert attention.choose("auto", torch.device("cpu"), torch.float32).backend in row
    for operation in ("focal_loss", "matched_box_loss", "matching_cost", "prediction_errors", "grid_positions"):
        (row, *_) = [line for line in printed.splitlines() if operation in line]
        assert "eager" in row
        assert "native" not in row
    for operation in ("relu_dropout", "dropout_add"):
        (row, *_) = [line for line in printed.splitlines() if operation in line]
        assert "triton" not in row
    assert "triton is refused: " in printed


def test_unavailable_backend_is_a_one_line_error(tmp_path, capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("Triton runs on this GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = ["train", *QUICK, "--train-images", "4", "--val-images", "1", "--out", str(tmp_path)]
    assert main([*command, "--backend", "triton"]) == 2
    assert "backend 'triton' cannot run here" in capsys.readouterr().err


def test_conflicting_models_and_repeated_options_are_errors(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(resolve_run({"preset": "conditional-detr-tiny"}).to_dict()))
    assert main(["train", "--config", str(file), "--preset", "detr-r101"]) == 2
    assert "--preset detr-r101: the configuration file is for conditional-detr-tiny" in capsys.readouterr().err
    parser = argparse.ArgumentParser()
    add_options(parser)
    same = ["--config", str(file), "--preset", "conditional-detr-tiny", "--lr", "0.25"]
    run = resolve_run(chosen_options(parser.parse_args(same))[0])
    assert (run.preset, run.train.lr) == ("conditional-detr-tiny", 0.25)
    # If a file only changes model options, the flag selects the preset.
    file.write_text('{"model": {"num_queries": 7}, "epochs": 3}')
    chosen, _ = chosen_options(parser.parse_args(["--config", str(file), "--preset", "detr-r101"]))
    assert (resolve_run(chosen).preset, resolve_run(chosen).model.num_queries) == ("detr-r101", 7)

    file.write_text(json.dumps(resolve_run({"coco_path": "coco"}).to_dict()))
    with pytest.raises(ValueError, match="--augment strong: the configuration file is for paper and sets 5 of its"):
        chosen_options(parser.parse_args(["--config", str(file), "--augment", "strong"]))
    flags = ["--config", str(file), "--augment", "paper", "--no-flip", "--mosaic", "0.5"]
    augment = resolve_run(chosen_options(parser.parse_args(flags))[0]).augment
    assert (augment.flip, augment.crop, augment.mosaic) == (False, "random", 0.5)

    file = tmp_path / "run.toml"
    file.write_text("lr = 0.5\n[train]\nlr = 0.1\n")
    assert main(["train", "--config", str(file), "--lr", "0.2"]) == 2
    assert "run.toml: option 'lr' is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [("--cuda-graphs", "on"), ("--no_cuda_graphs", "off"), ("--cuda-graphs off --lr 1", "off"), ("--lr 1", "auto")],
)
def test_former_switch_also_takes_a_value(flags, chosen):
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert resolve_run(chosen_options(parser.parse_args(flags.split()))[0]).train.cuda_graphs == chosen


def test_help_of_backend_lists_all_backends():
    assert all(f"`{backend}`" in option_help()["backend"] for backend in get_args(Backend))


def test_options_reach_the_model_and_the_training(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('preset = "conditional-detr-tiny"\nlr = 0.5\n[model]\ncsq = "I"\n[train]\nepochs = 1\n')
    command = ["train", "--config", str(file), "--batch-size", "4", "--train-images", "4", "--val-images", "1"]
    # Flags override the file; the official spelling is the same option.
    assert main([*command, "--out", str(tmp_path), "--no_aux_loss", "--lr", "0.002", "--dist_url", "x"]) == 0
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert record["lr"] == 0.002
    assert "loss_ce_0" not in record
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model"]["csq"], config["train"]["epochs"]) == ("I", 1)
    printed = capsys.readouterr().out
    assert "--dist_url has no effect here: torchrun sets the address where the processes meet." in printed
    assert "csq=I" in printed
    assert "GFLOPs" in printed


OFFICIAL = """--coco_path ../data/coco --output_dir output/r50 --dilation --batch_size 1 --lr 1e-4 --lr_backbone 1e-5
    --weight_decay 1e-4 --epochs 50 --lr_drop 40 --clip_max_norm 0.1 --backbone resnet101 --position_embedding sine
    --enc_layers 5 --dec_layers 4 --dim_feedforward 1024 --hidden_dim 128 --dropout 0.2 --nheads 4 --num_queries 100
    --no_aux_loss --set_cost_class 3 --set_cost_bbox 4 --set_cost_giou 1 --mask_loss_coef 1 --dice_loss_coef 1
    --cls_loss_coef 3 --bbox_loss_coef 4 --giou_loss_coef 1 --focal_alpha 0.3 --dataset_file coco --remove_difficult
    --device cpu --seed 7 --resume auto --start_epoch 0 --eval --num_workers 3 --world_size 1 --dist_url env://"""


def test_official_flags_set_our_options():
    options = argparse.ArgumentParser()
    add_options(options)
    chosen, notes = chosen_options(options.parse_args(OFFICIAL.split()))
    run = resolve_run(chosen)
    assert (run.preset, run.output_dir, run.resume, run.eval) == (
        "conditional-detr-dc5-r101",
        "output/r50",
        "auto",
        True,
    )
    assert (run.data.coco_path, run.train.batch_size, run.train.workers, run.train.seed) == ("../data/coco", 1, 3, 7)
    model = run.model
    assert (model.encoder_layers, model.decoder_layers, model.ffn_dim, model.hidden_dim) == (5, 4, 1024, 128)
    assert (model.dropout, model.num_heads, model.num_queries, model.aux_loss) == (0.2, 4, 100, False)
    assert (model.class_cost, model.bbox_cost, model.giou_cost, model.focal_alpha) == (3.0, 4.0, 1.0, 0.3)
    assert (model.class_weight, model.bbox_weight, model.giou_weight) == (3.0, 4.0, 1.0)
    assert (run.pretrained_backbone, run.backend) == (True, "auto")
    assert len(notes) == 7
    assert notes[-1].endswith("is an official flag: the precision is float32, as in the official code.")
    assert run.train.precision == "float32"
    # Without any flag the defaults are the official ones.
    plain = resolve_run({"coco_path": "coco"})
    assert (plain.model, plain.pretrained_backbone) == (resolve("conditional-detr-r50"), True)
    assert (plain.train.lr, plain.train.lr_backbone, plain.train.lr_drop, plain.train.batch_size) == (1e-4, 1e-5, 40, 2)


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        # The command on the official page has only flags that exist here too.
        ("--coco_path data --output_dir output/r50", "float32"),
        ("--nheads 8", "float32"),
        ("--coco_path data --precision auto", "auto"),
        ("--enc_layers 6 --precision bfloat16", "bfloat16"),
        ("--coco-path data --output-dir runs/r50 --num-workers 2 --lr 1e-4", "auto"),
        ("", "auto"),
    ],
)
def test_official_flags_mean_the_official_precision(flags, precision):
    parser = argparse.ArgumentParser()
    add_options(parser)
    chosen, notes = chosen_options(parser.parse_args(flags.split()))
    assert resolve_run(chosen).train.precision == precision
    assert len(notes) == (precision == "float32")


def test_written_configuration_is_read_back_equal(tmp_path):
    run = resolve_run({"coco_path": "coco", "epochs": 3, "num_queries": 7, "resume": "auto"})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(run.to_dict()))
    assert resolve_run(read_config(file)) == run
    with pytest.raises(ValueError, match=r"Unknown option 'epoch'\. Did you mean 'epochs'"):
        resolve_run({"train": {"epoch": 3}})
    with pytest.raises(ValueError, match="Training option epochs: expected int, got str 'many'"):
        resolve_run({"epochs": "many"})
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_config(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--coco-path", "/nowhere"], "Image folder /nowhere/train2017 does not exist"),
        (["train", "--csw", "I"], "unknown option '--csw'. Did you mean '--csq'?"),
        (["train", "--csq", "X"], "Model option csq: unknown value 'X'"),
        (["train", "--epochs", "0"], "Training option epochs: expected at least 1, got 0"),
        (["train", "--config", "/nowhere.toml"], "Configuration file /nowhere.toml does not exist"),
        (["train", "--masks"], "--masks True: segmentation is not implemented"),
        (["train", "--dataset_file", "coco_panoptic"], "--dataset_file coco_panoptic: other data sets"),
        (["train", "--eval"], "--eval needs --resume FILE"),
        (["train", "--train-images", "8", "--resume", "/nowhere.pt"], "Checkpoint /nowhere.pt does not exist"),
        (["eval", "--checkpoint", "/nowhere.pt"], "Checkpoint /nowhere.pt does not exist"),
        (["predict", __file__, "--checkpoint", "/nowhere.pt"], "Checkpoint /nowhere.pt does not exist"),
        # Image errors are reported before a model is loaded.
        (["predict", __file__, "a.jpg", "--checkpoint", "/nowhere.pt"], "Image file a.jpg does not exist"),
        (["predict", __file__, "--checkpoint", "/nowhere.pt", "--out", __file__], "expected a folder for pictures"),
        (["attention", "a.jpg", "--checkpoint", "/nowhere.pt"], "Image file a.jpg does not exist"),
        (["attention", "/", "--checkpoint", "/nowhere.pt"], "Image file /: expected a file, got a folder"),
        (["eval", "--checkpoint", "/no.pt", "--out", "//no.pt"], "--out //no.pt: this is also /no.pt"),
        (["eval", "--checkpoint", "/no.pt", "--out", "x", "--results", "./x"], "--out x: this is also ./x"),
        (["export", "--checkpoint", "/no.onnx", "--out", "/no.onnx"], "--out /no.onnx: this is also /no.onnx"),
        (
            ["validate-data", "--images", "/", "--annotations", "/no.json", "--report", "//no.json"],
            "--report //no.json: this is also /no.json",
        ),
        # Output files are checked before the work.
        (["eval", "--checkpoint", "/no.pt", "--out", "/"], "--out /: expected a name for a JSON file, got a folder"),
        (["eval", "--checkpoint", "/no.pt", "--results", __file__], "the file exists and is not JSON"),
        (["eval", "--checkpoint", "/no.pt", "--report", "/no.pt"], "--report /no.pt: expected a name ending in .html"),
        (
            ["eval", "--checkpoint", "/no.pt", "--report", "--out", "//report.html"],
            "--report /report.html: this is also //report.html",
        ),
        (["validate-data", "--images", "/", "--annotations", "/no.json", "--report", __file__], "is not JSON"),
        (["validate-data", "--images", "/", "--annotations", "/no.json", "--fix", __file__], "is not JSON"),
        # Numbers are checked before any file.
        (["eval", "--checkpoint", "/nowhere.pt", "--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["eval", "--checkpoint", "/nowhere.pt", "--batch-size", "-1"], "batch_size: expected at least 1, got -1"),
        (["eval", "--checkpoint", "/nowhere.pt", "--workers", "-1"], "workers: expected at least 0, got -1"),
        (
            ["predict", "a.jpg", "--checkpoint", "/nowhere.pt", "--threshold", "1.5"],
            "threshold: expected a number from",
        ),
        (["predict", "a.jpg", "--checkpoint", "/nowhere.pt", "--threshold", "nan"], "from 0 to 1, got nan"),
        (["predict", "a.jpg", "--checkpoint", "x", "--top-k", "0"], "top_k: expected at least 1, got 0"),
        (["predict", "a.jpg", "--checkpoint", "x", "--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["predict", "a.jpg", "--checkpoint", "x", "--every", "0"], "every: expected at least 1, got 0"),
        (["predict", "a.jpg", "--checkpoint", "x", "--max-frames", "0"], "max_frames: expected at least 1, got 0"),
        (["predict", __file__, "--checkpoint", "x", "--every", "2"], "--every: expected a video or a camera, got only"),
        (
            ["predict", __file__, "--checkpoint", "x", "--no-pictures", "--out", "y"],
            "--out y: nothing is written there",
        ),
        (["predict", __file__, "--checkpoint", "x", "--annotations", "y"], "--annotations: it gives the image ids of"),
        (["predict", __file__, "--checkpoint", "x", "--results", "y.txt"], "a name ending in .json or .csv"),
        (["predict", __file__, "--checkpoint", "/no.csv", "--results", "//no.csv"], "this is also /no.csv"),
        (
            ["predict", __file__, "--checkpoint", "x", "--results", "y.csv", "--results", "./y.csv"],
            "--results ./y.csv: this is also y.csv",
        ),
        (
            ["predict", __file__, "--checkpoint", "x", "--graphs", "--device", "cpu"],
            "graphs need an NVIDIA GPU, got the",
        ),
        (
            ["predict", __file__, "--checkpoint", "x", "--graphs", "--compile"],
            "--graphs and --compile: expected at most",
        ),
        (
            ["predict", __file__, "--checkpoint", "x", "--compile", "--backend", "eager"],
            "--compile: expected another backend than eager",
        ),
        (["demo", "--seconds", "0"], "--seconds: expected more than 0, got 0"),
        (["demo", "--seconds", "nan"], "--seconds: expected more than 0, got nan"),
        (
            ["validate-data", "--images", "/n", "--annotations", "/n", "--processes", "0"],
            "processes: expected at least 1",
        ),
    ],
)
def test_bad_input_is_a_one_line_error_with_status_two(arguments, message, capsys):
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["train", "--epochs", "many"], ["eval", "--workers", "1.5"], ["nothing"], []])
def test_unknown_command_is_a_one_line_error(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert errors.rstrip().endswith("--help")


@pytest.mark.parametrize("option", ["--count", "--rounds"])
def test_bench_data_checks_its_counts(small_coco, capsys, option):
    assert main(["bench-data", "--coco-path", str(small_coco.root), option, "0"]) == 2
    assert capsys.readouterr().err == f"conddetr bench-data: {option}: expected at least 1, got 0.\n"


def test_report_is_written_if_the_pipe_ends_early(tmp_path, monkeypatch):
    annotations = tmp_path / "all.json"
    annotations.write_text('{"images": [], "annotations": [], "categories": []}')
    read_end, write_end = os.pipe()
    os.close(read_end)
    report = tmp_path / "report.json"
    with open(write_end, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        # rich would stay silent after this, so the setting is restored at the end.
        monkeypatch.setattr(console, "quiet", False)
        arguments = ["--images", str(tmp_path), "--annotations", str(annotations), "--report", str(report)]
        with pytest.raises(SystemExit):
            main(["validate-data", *arguments])
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            stream.close()
    assert not json.loads(report.read_text())["ok"]
