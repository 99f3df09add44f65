"""The check of kernels on a GPU that computes nothing: every kernel is refused, and nothing crashes."""

import importlib

import pytest
import torch

from conddetr.cli import main
from conddetr.kernels import records
from conddetr.kernels.attn import triton
from conddetr.kernels.check import tuning
from conddetr.kernels.check.isolation import isolated
from conddetr.kernels.check.table import summary

check = importlib.import_module("conddetr.kernels.check")


@pytest.fixture(autouse=True)
def _no_record(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDDETR_CACHE", str(tmp_path))
    records.forget()
    yield
    records.forget()


def test_on_a_gpu_with_wrong_sums_all_kernels_are_refused():
    report = check.examine("cuda")
    refused = {x.refused for x in report.record.verdicts}
    assert refused == {"plain PyTorch computes wrong sums on cuda:0."}
    assert {x.operation for x in report.record.verdicts} >= {"add_norm", "conditional_attention", "linear_assignment"}
    assert report.compilation is None
    # One line covers all kernels.
    lines = [line for line in summary(report) if line.startswith("REFUSED")]
    assert lines == [f"REFUSED: {len(report.record.verdicts)} kernels: {refused.pop()}"]


def test_tuning_on_a_gpu_with_wrong_sums_records_nothing(capsys, monkeypatch):
    assert main(["check", "--tune", "--short", "--device", "cuda"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "left out: no setting is tuned: plain PyTorch computes wrong sums on cuda:0." in said
    assert records.load(torch.device("cuda:0")).tuned == {}


def test_settings_with_wrong_results_are_left_out(monkeypatch):
    """As if the device computed sums: each setting is launched, and none is chosen."""
    every, subjects, settings_of = check.problems, tuning.subjects, tuning.settings_of
    monkeypatch.setattr(check, "problems", lambda images: [x for x in every(images) if x.operation == "max_pool"])
    monkeypatch.setattr(check, "compile_kernels", lambda *_: 1.5)
    monkeypatch.setattr(check, "_computes", lambda device: True)
    monkeypatch.setattr(tuning, "subjects", lambda *arguments: subjects(*arguments)[:1])
    monkeypatch.setattr(tuning, "settings_of", lambda *arguments: settings_of(*arguments)[:2])
    monkeypatch.setattr(tuning, "KERNELS", ("backward_key",))
    report = check.examine("cuda", short=True, tune=True, dtypes=[torch.float32])
    assert report.record.tuned == {}
    assert report.tuning.choices == []
    assert len(report.tuning.left_out) == 2
    assert all(
        line.startswith("attention backward_key, tf32, 32 channels, separable") for line in report.tuning.left_out
    )


def test_settings_are_compiled_before_they_are_captured(monkeypatch):
    """Every setting is launched once, which compiles it; then a CUDA graph is timed."""
    device = torch.device("cuda:0")
    settings_of = tuning.settings_of
    monkeypatch.setattr(tuning, "settings_of", lambda *arguments: settings_of(*arguments)[:2])
    launched = []
    options = triton.Inputs.options
    monkeypatch.setattr(triton.Inputs, "options", lambda self, tiles: launched.append(tiles) or options(self, tiles))
    [subject, *_] = tuning.subjects(device, [torch.bfloat16])
    with isolated(device):
        tuning.launch_all(subject, "forward", device)
        assert len(set(launched)) == 2
        launched.clear()
        inputs = subject.inputs(device)
        replay = tuning._captured(lambda: triton.forward(inputs), device)
        assert len(launched) == 1 + tuning.CALLS
        replay()
        assert len(tuning.seconds_of([replay], device)) == 1
    assert len(launched) == 1 + tuning.CALLS, "a replay launches nothing"


def test_wrong_results_are_refused(monkeypatch):
    """As if the device computed sums: every step runs, on one operation of each kind, after compilation."""
    chosen = {"dropout_bits", "focal_loss", "linear_assignment", "max_pool"}
    every = check.problems
    monkeypatch.setattr(check, "problems", lambda images: [x for x in every(images) if x.operation in chosen])
    monkeypatch.setattr(check, "compile_kernels", lambda *_: 1.5)
    monkeypatch.setattr(check, "_computes", lambda device: True)
    report = check.examine("cuda", short=True, dtypes=[torch.float32])
    assert {x.operation for x in report.record.verdicts} == chosen
    assert all(x.refused for x in report.record.verdicts), report.record.verdicts
    assert "after 2 s of compilation: 0 ok" in summary(report)[-1]
