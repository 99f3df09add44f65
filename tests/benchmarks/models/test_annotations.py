"""Readers of annotation files are compared on the same numbers, each in a process of its own."""

import json

import pytest

from conddetr.data.annotations import read_annotations
from harness.benchmark import failures
from models import annotations


def test_a_file_is_as_large_as_asked_for(tmp_path):
    annotations.make(tmp_path / "x.json", 20)
    found = read_annotations(tmp_path / "x.json")
    assert (len(found), len(found.boxes), len(found.categories)) == (3, 20, 80)


def test_all_readers_find_the_same():
    pytest.importorskip("pycocotools")
    result = annotations.measured(50, rounds=1)
    assert set(result.seconds) == set(annotations.READERS)
    assert failures([result]) == []
    assert all(seconds > 0 for [seconds] in result.seconds.values())


def test_a_wrong_reader_is_refused(monkeypatch):
    def answers(command, **_):
        boxes = 4 if "ours" in command else 5
        found = {"seconds": 1.0, "bytes": 8, "boxes": boxes, "sum": 2.0}
        return type("Done", (), {"stdout": b"noise\n" + json.dumps(found).encode()})

    monkeypatch.setattr(annotations.subprocess, "run", answers)
    result = annotations.measured(5, rounds=2)
    assert set(result.seconds) == {"json, entry by entry", "pycocotools"}
    assert failures([result]) == [f"{result.title}: ours: wrong answer: other boxes than Python's reader finds"]
