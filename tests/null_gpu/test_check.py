"""The check of kernels on a GPU that computes nothing: everything is refused, and nothing breaks."""

import importlib

import pytest
import torch

from conddetr.kernels import records
from conddetr.kernels.check.table import summary

check = importlib.import_module("conddetr.kernels.check")


@pytest.fixture(autouse=True)
def _no_record(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDDETR_CACHE", str(tmp_path))
    records.forget()
    yield
    records.forget()


def test_a_gpu_that_cannot_add_up_has_nothing_checked():
    report = check.examine("cuda")
    refused = {x.refused for x in report.record.verdicts}
    assert refused == {"nothing is right on cuda:0: plain PyTorch's sums are wrong."}
    assert {x.operation for x in report.record.verdicts} >= {"add_norm", "conditional_attention", "linear_assignment"}
    assert report.compilation is None
    # One line says so of all.
    said = [line for line in summary(report) if line.startswith("REFUSED")]
    assert said == [f"REFUSED: {len(report.record.verdicts)} kernels: {refused.pop()}"]


def test_results_that_are_none_are_refused(monkeypatch):
    """As if the device could add up: every step runs, on one operation of each kind, after it was compiled."""
    chosen = {"dropout_bits", "focal_loss", "linear_assignment", "max_pool"}
    every = check.problems
    monkeypatch.setattr(check, "problems", lambda images: [x for x in every(images) if x.operation in chosen])
    monkeypatch.setattr(check, "compile_kernels", lambda *_: 1.5)
    monkeypatch.setattr(check, "_computes", lambda device: True)
    report = check.examine("cuda", short=True, dtypes=[torch.float32])
    assert {x.operation for x in report.record.verdicts} == chosen
    assert all(x.refused for x in report.record.verdicts), report.record.verdicts
    assert "after 2 s of compilation: 0 ok" in summary(report)[-1]
