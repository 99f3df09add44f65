"""The benchmark of annotation readers compares them on the same numbers, each in a separate process."""

import json

import pytest

from conddetr.data.annotations import read_annotations
from harness.benchmark import failures
from models import annotations


def test_file_has_the_requested_number_of_boxes(tmp_path):
    annotations.make(tmp_path / "x.json", 20)
    annotation_set = read_annotations(tmp_path / "x.json")
    assert (len(annotation_set), len(annotation_set.boxes), len(annotation_set.categories)) == (3, 20, 80)


def test_all_readers_agree():
    pytest.importorskip("pycocotools")
    result = annotations.measured(50, rounds=1)
    assert set(result.seconds) == set(annotations.READERS)
    assert failures([result]) == []
    assert all(seconds > 0 for [seconds] in result.seconds.values())


def test_wrong_reader_is_refused(monkeypatch):
    def answers(command, **_):
        boxes = 4 if "ours" in command else 5
        output = {"seconds": 1.0, "bytes": 8, "boxes": boxes, "sum": 2.0}
        return type("Done", (), {"stdout": b"noise\n" + json.dumps(output).encode()})

    monkeypatch.setattr(annotations.subprocess, "run", answers)
    result = annotations.measured(5, rounds=2)
    assert set(result.seconds) == {"json, entry by entry", "pycocotools"}
    assert failures([result]) == [f"{result.title}: ours: wrong answer: the boxes differ from those of Python's reader"]
