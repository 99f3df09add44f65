"""Attention is measured at every size, its memory too, and drawn from the file."""

import argparse
import json
from dataclasses import asdict

import attn
import pytest
import scaling
import torch
from harness import Result, Work, _host_peak

OPTIONS = argparse.Namespace(rounds=3, cudagraph=False)


def test_one_size(monkeypatch):
    # Measuring the machine takes seconds, Triton's interpreter too.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(attn, "copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr(attn, "product_rate", lambda dtype: 1e11)
    problem = attn.Problem("10×10", 1, torch.float32, 0.0, padded=False, backward=False, queries=7)
    result = scaling.attention(problem, OPTIONS)
    assert "official eager" in result.seconds
    assert result.work.flops == 2 * 8 * 7 * 100 * 96
    assert not set(scaling.COMPILED) & set(result.seconds)


def test_axes_grow():
    axes = scaling.problems(backward=False)
    keys = [attn.GRIDS[problem.grid] for problem in axes["keys"].values()]
    assert [height * width for height, width in keys] == list(axes["keys"])
    assert min(axes["keys"]) == 100
    assert 9e4 < max(axes["keys"]) < 1.1e5
    assert [problem.queries for problem in axes["queries"].values()] == list(axes["queries"])


def test_memory_at_its_highest():
    def run():
        first = torch.ones(1 << 18)
        second = 2 * first
        del first
        return second + 1

    # Two of the three tensors of 1 MiB live at once.
    assert _host_peak(run) == pytest.approx(2 * 2**20, rel=1e-3)


def test_picture(tmp_path):
    work = Work(1.0, 1.0, {"bytes": 1e-4})
    results = [
        Result("a", {"peer": [1e-3], "ours": [2e-3]}, work, {"peer": 2**21, "ours": 2**10}),
        Result("b", {"ours": [1.0]}, None, {"ours": 1}),
    ]
    entries = [
        {"axis": axis, "value": 10, **asdict(result)} for axis, result in zip(("keys", "batch"), results, strict=True)
    ]
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps({"results": entries}))
    assert scaling.draw(path).read_bytes().startswith(b"\x89PNG")
