"""Time and memory of attention at every size are measured, and plotted from the file."""

import argparse
import json

import pytest
import torch

import conddetr
from harness import rates, report, store
from harness.memory import host_peak
from harness.result import Result, Work
from models import scaling
from ops import attn

OPTIONS = argparse.Namespace(rounds=3, cudagraph=False)


def test_attention_at_one_size(monkeypatch):
    # Measuring the machine takes seconds, and so does Triton's interpreter.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(rates, "copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr(rates, "product_rate", lambda dtype: 1e11)
    problem = attn.Problem("10×10", 1, torch.float32, 0.0, padded=False, backward=False, queries=7)
    result = scaling.attention(problem, OPTIONS)
    assert "official eager" in result.seconds
    assert result.work.flops == 2 * 8 * 7 * 100 * 96
    assert not set(scaling.COMPILED) & set(result.seconds)


def test_values_of_the_axes():
    axes = scaling.problems(backward=False)
    keys = [attn.GRIDS[problem.grid] for problem in axes["keys"].values()]
    assert [height * width for height, width in keys] == list(axes["keys"])
    assert min(axes["keys"]) == 100
    assert 9e4 < max(axes["keys"]) < 1.1e5
    assert [problem.queries for problem in axes["queries"].values()] == list(axes["queries"])


def test_peak_memory():
    def run():
        first = torch.ones(1 << 18)
        second = 2 * first
        del first
        return second + 1

    # Two of the three tensors of 1 MiB live at once.
    assert host_peak(run) == pytest.approx(2 * 2**20, rel=1e-3)


def test_chart(tmp_path):
    work = Work(1.0, 1.0, {"bytes": 1e-4})
    results = [
        Result("a", {"peer": [1e-3], "ours": [2e-3]}, work, {"peer": 2**21, "ours": 2**10}),
        Result("b", {"ours": [1.0]}, None, {"ours": 1}),
    ]
    entries = [
        scaling.entry(scaling.Size(axis, 10, None, 2**9), result)
        for axis, result in zip(("keys", "batch"), results, strict=True)
    ]
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps({"left_out": ["keys 100"], "results": entries}))
    assert scaling.draw(path).read_bytes().startswith(b"\x89PNG")


def test_training_step_is_timed_beside_the_official_one(monkeypatch):
    monkeypatch.setattr(scaling, "product_rate", lambda dtype: 1e11)
    one, two = (scaling.training_step(OPTIONS, batch=batch) for batch in (1, 2))
    assert list(one.seconds) == ["official-style eager", "ours, auto"]
    assert one.peak_extra_bytes["ours, auto"] > 0
    # Two FLOPs per multiply-add; forward and backward have three times the FLOPs of forward.
    assert one.work.flops == pytest.approx(6 * 1e9 * conddetr.presets()["conditional-detr-tiny"].gflops, rel=0.01)
    # Positions are projected once for all images.
    assert 1.9 * one.work.flops < two.work.flops < 2 * one.work.flops


def test_wrong_answer_does_not_stop_the_other_sizes(tmp_path, monkeypatch):
    def wrong():
        raise RuntimeError("no inputs")

    right = Result("right", {"ours": [0.00123456]}, None, {"ours": 1}, {"ours, other": "wrong answer: by far"})
    sizes = [scaling.Size("keys", 10, wrong), scaling.Size("keys", 20, lambda: right)]
    monkeypatch.setattr(scaling, "sizes_of", lambda options: sizes)
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    with pytest.raises(SystemExit) as stop:
        scaling.main(["--backward"])
    assert stop.value.code.splitlines() == [
        "keys 10: the problem itself: failed: no inputs",
        "right: ours, other: wrong answer: by far",
    ]
    path = next(tmp_path.glob("*/scaling-backward.json"))
    content = json.loads(path.read_text())
    assert content["left_out"] == ["keys 10"]
    assert content["results"][0]["seconds"] == {"ours": [0.001235]}
    assert path.with_suffix(".png").exists()
    assert report.files(path.parent) == []
