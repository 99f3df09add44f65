"""What a session prints and counts, on many images, unreadable inputs and after Ctrl-C."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import conddetr
from conddetr.prediction import session as sessions
from conddetr.prediction.results import CocoDatasetFile, CsvFile
from conddetr.prediction.session import LISTED_IMAGES, Session
from conddetr.viz.pictures import PictureFolder

CLASSES = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "toothbrush"}]


@pytest.fixture
def detector(tiny_model):
    return conddetr.Detector(tiny_model, CLASSES, "cpu", precision="float32").fused()


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Makes images `00.png`, `01.png`, … in the current folder, some of them damaged."""
    monkeypatch.chdir(tmp_path)

    def make(count, damaged=()):
        paths = [tmp_path.joinpath(f"{index:02}.png").relative_to(tmp_path) for index in range(count)]
        for index, path in enumerate(paths):
            Image.new("RGB", (8, 8)).save(path)
            if index in damaged:
                path.write_bytes(path.read_bytes()[:40])
        return paths

    return make


def test_of_many_images_only_the_unreadable_ones_have_lines(detector, photos, capsys):
    few = photos(LISTED_IMAGES)
    Session(detector, few, None, [], threshold=1.0).run()
    assert capsys.readouterr().out.splitlines() == [f"{path}: 0 objects" for path in few]
    many = photos(LISTED_IMAGES + 2, damaged=(3, 21))
    session = Session(detector, many, PictureFolder("drawn", "predict", many), [], threshold=1.0)
    session.run()
    *errors, last = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in errors] == ["03.png", "21.png"]
    assert last == "wrote 20 pictures to drawn"
    assert (session.images, session.drawn, len(session.errors)) == (20, 20, 2)
    with pytest.raises(ValueError, match=r"2 of 22 inputs cannot be read, first: Image file 03\.png"):
        session.raise_errors()


def test_errors_without_a_line_are_counted(detector, photos, capsys, monkeypatch):
    monkeypatch.setattr(sessions, "LISTED_ERRORS", 2)
    Session(detector, photos(5, damaged=range(1, 5)), None, [], threshold=1.0).run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines[:-1]] == ["00.png", "01.png", "02.png"]
    assert lines[-1] == "2 more inputs cannot be read"


def test_a_video_that_vanished_is_left_out(detector, photos, tmp_path, capsys):
    pytest.importorskip("cv2", reason="videos need OpenCV (pip install 'conddetr[video]')")
    session = Session(detector, [Path("gone.mp4"), *photos(1)], None, [], threshold=1.0)
    session.run()
    assert (session.images, [type(error) for error in session.errors]) == (1, [FileNotFoundError])
    assert capsys.readouterr().out.splitlines()[0] == "Video file gone.mp4 does not exist."


def test_all_files_have_the_same_images_after_ctrl_c(detector, photos, default_interrupt_handler):
    class Interrupted(CsvFile):
        def add(self, prediction):
            super().add(prediction)
            signal.raise_signal(signal.SIGINT)

    files = [Interrupted("a.csv"), CocoDatasetFile("a.json", CLASSES)]
    session = Session(detector, photos(3), None, files, threshold=0.0, top_k=2)
    with pytest.raises(KeyboardInterrupt):
        session.run()
    assert [line.partition(",")[0] for line in Path("a.csv").read_text().splitlines()] == ["image", "00.png", "00.png"]
    content = json.loads(Path("a.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["00.png"]
    assert (session.images, session.objects) == (1, 2)


def test_ctrl_c_in_images_after_a_camera_is_an_interruption(detector, photos, monkeypatch):
    cv2 = pytest.importorskip("cv2", reason="cameras need OpenCV (pip install 'conddetr[video]')")

    class Camera:
        def isOpened(self):  # noqa: N802
            return True

        def get(self, _):
            return 0.0

        def read(self):
            return True, np.zeros((48, 64, 3), np.uint8)

        def release(self):
            pass

    class Interrupted(CsvFile):
        def add(self, prediction):
            is_live.append(session.is_live)
            if isinstance(prediction.source, Path):
                raise KeyboardInterrupt

    is_live = []
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: Camera())
    session = Session(detector, ["camera:0", *photos(2)], None, [Interrupted("a.csv")], max_frames=2)
    with pytest.raises(KeyboardInterrupt):
        session.run()
    assert is_live == [True, True, False]
