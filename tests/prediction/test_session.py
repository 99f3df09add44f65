"""What a session prints and counts, on many images, unreadable inputs and after Ctrl-C."""

import pytest
from PIL import Image

import conddetr
from conddetr.prediction import session as sessions
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
