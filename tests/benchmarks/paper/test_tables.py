"""The tables' counts are right, and the committed ones agree with the paper."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import conddetr
from conddetr.data.coco import coco_split
from conddetr.data.transforms import EvalTransform
from harness import store
from paper import tables

COMMITTED = json.loads((store.RESULTS / "paper" / "tables.json").read_text())


def test_multiply_add_counts_as_one():
    linear = torch.nn.Linear(30, 50, bias=False)
    assert tables.count(lambda: linear(torch.zeros(7, 30))) == pytest.approx(7 * 30 * 50 / 1e9)


@pytest.mark.parametrize("separable", [False, True])
def test_attention_counts_scores_and_values(separable):
    batch, queries, height, width, heads, d, ds, dv = 2, 5, 3, 4, 2, 16, 32, 8
    with FakeTensorMode():
        make = lambda n, width: torch.empty(batch, n, heads, width)  # noqa: E731
        spatial = (make(height, ds), make(width, ds)) if separable else (make(height * width, ds), None)
        inputs = (make(queries, d), make(queries, ds), make(height * width, d), *spatial, make(height * width, dv))
        gflops = tables.count(
            lambda: torch.ops.conddetr.conditional_attention(*inputs, None, None, None, scale=1.0, dropout_p=0.0)
        )
    assert gflops == pytest.approx(batch * heads * queries * height * width * (d + ds + dv) / 1e9)


def test_mean_over_images():
    def forward(height, width):
        torch.zeros(height, 10) @ torch.zeros(10, width)

    assert tables.average(forward, {(2, 3): 3, (4, 5): 1}) == pytest.approx((3 * 60 + 200) / 4 / 1e9)


def test_sizes_of_validation_images(small_coco):
    # 60×90 and 70×90, with the long side at most 1333.
    assert tables.image_sizes(str(small_coco.root)) == {(800, 1200): 1, (800, 1029): 1}
    assert sum(tables.image_sizes(None).values()) == 72


def test_committed_page_matches_the_committed_figures():
    assert (store.RESULTS / "paper" / "tables.md").read_text() == tables.markdown(COMMITTED)
    rows = {title: [tables.asdict(row) for row in rows] for title, rows in tables.TABLES.items()}
    assert json.loads(json.dumps(rows)) == COMMITTED["tables"]


@pytest.mark.parametrize("row", [row for row in tables.TABLES[next(iter(tables.TABLES))] if "Deform" not in row.model])
def test_models_have_as_many_parameters_as_the_papers(row):
    counts = COMMITTED["measured"][row.measured_as]
    assert 1e-6 * counts["parameters"] == pytest.approx(row.parameters, rel=0.02)


OURS = [row for title in list(tables.TABLES)[::2] for row in tables.TABLES[title] if "Deform" not in row.model]


@pytest.mark.parametrize("row", OURS)
def test_models_need_as_many_gflops_as_the_papers(row):
    counts = COMMITTED["measured"][row.measured_as]
    assert counts["images"] > 0
    assert counts["gflops"] == pytest.approx(row.gflops, rel=0.02)


def test_faster_rcnn_is_counted_as_it_runs():
    # 1000 proposals; the 2000 of training would be 7 % more.
    assert tables.faster_rcnn({(800, 1066): 1}, "resnet50").gflops == pytest.approx(180, rel=0.02)


def test_no_ap_without_weights():
    assert COMMITTED["measured AP"] == {}
    assert tables.lines_of(COMMITTED, next(iter(tables.TABLES)))[1][0][-1] == "–"


def test_each_row_has_its_own_weights():
    rows = {row.model: row for rows in tables.TABLES.values() for row in rows}
    names = {model: tables.checkpoint(Path(), row).name for model, row in rows.items()}
    assert names["DETR-R50"] == "detr-r50-50.pth"
    assert names["UP-DETR-R50"] == "up-detr-r50-300.pth"
    assert names["CSQ-T"] == "conditional-detr-r50-csq-T-50.pth"
    assert names["CSQ"] == names["Conditional DETR-R50"].replace("108", "50")


def test_interpreter_is_off_afterwards(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with tables.interpreted():
        assert os.environ["TRITON_INTERPRET"] == "1"
    assert "TRITON_INTERPRET" not in os.environ


def test_every_model_without_a_count_is_named():
    without = {"one": tables.Measured(not_measured="needs x"), "two": tables.Measured(not_measured="needs x")}
    content = {**COMMITTED, "measured": {name: tables.asdict(counts) for name, counts in without.items()}}
    page = tables.markdown(content)
    assert "- one, two: needs x." in page
    assert "| CSQ-C | 50 | 89.3 | published only | – | – |" in page


def test_ap_of_available_weights(small_coco, tmp_path, monkeypatch):
    row = tables.Row("Conditional DETR-tiny", 50, 0.04, 1, (40.0,), "conditional-detr-tiny")
    monkeypatch.setattr(tables, "TABLES", {"first": [row], "again": [row, replace(row, epochs=75)]})
    counts = lambda sizes: tables.Measured(553393, 0.04, images=2)  # noqa: E731
    monkeypatch.setattr(tables, "MODELS", {"conditional-detr-tiny": counts})
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "notes_of", lambda content: [])
    classes = coco_split(small_coco.root, "val", EvalTransform(conddetr.build("conditional-detr-tiny").config)).classes
    model = conddetr.build("conditional-detr-tiny", num_classes=len(classes))
    conddetr.Detector(model, classes, "cpu").save(tmp_path / "ours.pt").rename(
        tmp_path / "conditional-detr-tiny-50.pth"
    )
    torch.save({"model": {"somebody.weight": torch.ones(2)}}, tmp_path / "conditional-detr-tiny-75.pth")
    seen = []
    evaluated = tables.evaluated
    monkeypatch.setattr(tables, "evaluated", lambda file, coco: seen.append(file.name) or evaluated(file, coco))
    monkeypatch.setenv("CONDDETR_COCO", str(small_coco.root))
    words = ["--weights-dir", str(tmp_path)]
    tables.main(words)
    content = json.loads((tmp_path / "paper" / "tables.json").read_text())
    measured_ap = content["measured AP"]
    assert list(measured_ap) == ["Conditional DETR-tiny, 50"]
    assert len(measured_ap["Conditional DETR-tiny, 50"]) == 6
    assert sorted(seen) == ["conditional-detr-tiny-50.pth", "conditional-detr-tiny-75.pth"]
    headings, lines = tables.lines_of(content, "again")
    assert headings[-6:] == [f"{name}, measured" for name in tables.COLUMNS]
    assert lines[1][-6:] == ["–"] * 6
