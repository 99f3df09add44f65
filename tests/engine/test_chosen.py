"""The line that names the implementations of a run, their record in checkpoints, and the check before a run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from announced_paths import announced_and_recorded
from small_runs import finish, small_trainer, start_ranks

import conddetr
from conddetr.config import PRESETS
from conddetr.engine import chosen as module
from conddetr.engine import distributed
from conddetr.engine.checkpoint import read_checkpoint
from conddetr.engine.chosen import chosen, prove
from conddetr.kernels import native, records, registry
from conddetr.kernels.records import Record, Verdict, machine, memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")
R50 = PRESETS["conditional-detr-r50"]
UNCHECKED = "it is not checked on this GPU: run `conddetr check`"


def record(**speedups: float | str) -> Record:
    """Record of an H100, from operation → speed-up of Triton's kernels, or why they are refused."""
    verdicts = []
    for name, result in speedups.items():
        refused, speedup = (result, None) if isinstance(result, str) else ("", result)
        verdicts += [Verdict(name, "triton", x, refused, 0.5, speedup) for x in ("float32", "bfloat16")]
    return Record({"device": "NVIDIA H100"}, tuple(verdicts), False, "2026-11-29", {})


GOOD = {"conditional_attention": 2.1, "linear_assignment": 9.0, "focal_loss": 3.0, "convolution": 1.2}


@pytest.fixture
def on_gpu(monkeypatch):
    """Pretend that Triton can run; fixed text for PyTorch's TF32 switches."""
    monkeypatch.setattr(registry, "why_not", lambda backend, *_, **__: None if backend == "triton" else "not built.")
    monkeypatch.setattr(module, "float32_products", lambda _: "TF32 as it is")


def line(backend: str = "auto", precision: str = "bfloat16", trains: bool = True, **options: object) -> str:
    return chosen(R50, backend, GPU, precision, trains=trains, **options).line()


def test_line_if_all_kernels_are_proven(on_gpu):
    with records.pretend(record(**GOOD)):
        assert line() == (
            "attention: triton (checked on NVIDIA H100, 2.1×), matching: triton (9.0×), loss: triton (3.0×), "
            "backbone: channels-last (1.2×), bfloat16, TF32 as it is"
        )
        assert line(trains=False, precision="float32") == (
            "attention: triton (checked on NVIDIA H100, 2.1×), backbone: channels-last (1.2×), float32, TF32 as it is"
        )
        assert "backbone: PyTorch, compiled" in line(compiled=True)


def test_line_if_no_kernel_is_proven(on_gpu):
    with records.pretend(None):
        assert line() == (
            f"attention: PyTorch ({UNCHECKED}), matching: PyTorch, loss: PyTorch, backbone: PyTorch, "
            "bfloat16, TF32 as it is"
        )


def test_line_gives_the_reason_of_a_refused_kernel(on_gpu):
    slow = {**GOOD, "conditional_attention": "it is slower than PyTorch here: 0.8× its speed."}
    with records.pretend(record(**slow)):
        assert line().startswith(
            "attention: PyTorch (it is slower than PyTorch here: 0.8× its speed), "
            "matching: triton (checked on NVIDIA H100, 9.0×), loss: triton (3.0×)"
        )


def test_line_names_other_refused_kernels(on_gpu):
    slow = {**GOOD, "add_norm": "it is slower than PyTorch here: 0.8× its speed.", "max_pool": 1.5}
    with records.pretend(record(**slow)):
        assert line().endswith(", TF32 as it is, not used: add_norm (it is slower than PyTorch here: 0.8× its speed)")
        assert "not used" not in line("triton")


def test_backend_requested_by_name_needs_no_proof(on_gpu):
    with records.pretend(None):
        assert line("triton") == (
            "attention: triton, matching: triton, loss: triton, backbone: channels-last, bfloat16, TF32 as it is"
        )
        assert line("eager").startswith(
            "attention: PyTorch (backend eager), matching: PyTorch, loss: PyTorch, backbone: PyTorch, bf"
        )


def test_line_on_a_cpu(monkeypatch):
    if native.NOT_LOADED is None:
        assert chosen(R50, "auto", CPU, "float32", trains=True).line() == (
            "attention: native, matching: native, loss: PyTorch, backbone: native, float32"
        )
        tiny = PRESETS["conditional-detr-tiny"]
        assert (
            chosen(tiny, "auto", CPU, "float32", trains=False).line() == "attention: native, backbone: PyTorch, float32"
        )
    monkeypatch.setattr(native, "NOT_LOADED", "the native kernels are not built.")
    assert chosen(R50, "auto", CPU, "float32", trains=False).line() == (
        "attention: PyTorch (the native kernels are not built), backbone: PyTorch, float32"
    )


def test_reason_on_a_cpu_is_that_of_the_native_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if native.NOT_LOADED is None:
        assert chosen(R50, "auto", CPU, "bfloat16", trains=False).line() == (
            "attention: native, backbone: PyTorch (its kernels take float32, float64, not bfloat16), bfloat16"
        )
    text = chosen(PRESETS["detr-r50"], "triton", CPU, "float32", trains=True).line()
    assert text.startswith(
        "attention: PyTorch (this operation has no kernels of this backend), matching: PyTorch (its kernels ru"
    )


def test_operation_without_gpu_kernels_needs_no_reason(on_gpu):
    """The original DETR's attention runs on PyTorch; kernels compute only its box losses."""
    with records.pretend(record(**{**GOOD, "matched_box_loss": 4.0})):
        text = chosen(PRESETS["detr-r50"], "auto", GPU, "bfloat16", trains=True).line()
    assert text.startswith("attention: PyTorch, matching: triton (checked on NVIDIA H100, 9.0×), loss: triton (4.0×)")


def test_unsupported_sizes_are_the_reason(on_gpu):
    narrow = replace(R50, hidden_dim=64, num_queries=20_000)
    with records.pretend(record(**GOOD)):
        parts = chosen(narrow, "auto", GPU, "float32", trains=True).parts
    assert (parts["attention"].by, parts["attention"].note) == (
        "PyTorch",
        "d, ds, dv must be from 16 to 128, got (8, 8, 8)",
    )
    assert parts["matching"].note == "its kernel takes at most 4096 queries, got 20000"


@pytest.mark.parametrize(
    ("preset", "backend", "precision", "trains"),
    [
        ("conditional-detr-tiny", "auto", "float32", True),
        ("conditional-detr-tiny", "native", "bfloat16", False),
        ("conditional-detr-tiny", "eager", "float32", True),
        ("conditional-detr-r50", "auto", "float32", False),
        ("conditional-detr-r50", "auto", "bfloat16", False),
        ("detr-r50", "auto", "float32", True),
    ],
)
def test_reported_implementations_are_those_that_run(preset, backend, precision, trains):
    if backend == "native" and native.NOT_LOADED is not None:
        pytest.skip(str(native.NOT_LOADED))
    reported, executed = announced_and_recorded(preset, "cpu", precision, trains=trains, backend=backend)
    assert reported == executed


def test_run_prints_the_line_and_checkpoint_stores_it(tmp_path, capsys):
    trainer = small_trainer(tmp_path, model_options={"backend": "auto"}, epochs=1)
    trainer.fit()
    assert trainer.chosen.line() in capsys.readouterr().out.splitlines()
    kept = read_checkpoint(tmp_path / "checkpoint.pt")["chosen"]
    assert kept == trainer.chosen.to_dict()
    assert kept["precision"] == "float32"
    assert kept.keys() == {"attention", "matching", "loss", "backbone", "precision"}


@pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
def test_resumed_run_reports_changed_implementations(tmp_path, monkeypatch):
    small_trainer(tmp_path, model_options={"backend": "auto"}, epochs=1).fit()
    unchanged = small_trainer(tmp_path, model_options={"backend": "auto"}, epochs=2)
    unchanged.resume(tmp_path / "checkpoint.pt")
    assert unchanged.changes == []
    monkeypatch.setattr(native, "NOT_LOADED", "the native kernels are not built.")
    changed = small_trainer(tmp_path, model_options={"backend": "auto"}, epochs=2)
    changed.resume(tmp_path / "checkpoint.pt")
    assert changed.changes == [
        "attention ran on native, now runs on PyTorch: the native kernels are not built",
        "matching ran on native, now runs on PyTorch: the native kernels are not built",
    ]


@pytest.fixture
def checks(monkeypatch) -> list:
    """Devices that were checked; the simulated check accepts all kernels."""
    checked = []

    def check(device):
        checked.append(device)
        records.adopt(device, record(**GOOD))

    monkeypatch.setattr(module, "_check", check)
    for owner in (records, machine):
        monkeypatch.setattr(owner, "identity", lambda device: {"device": "NVIDIA H100"})
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(machine, "compute_capability", lambda device: "9.0")
    monkeypatch.setattr(memory, "_lookups", {})
    monkeypatch.setattr(memory, "_tables", {"sm_90": None})
    return checked


def test_gpu_without_a_record_is_checked_once(checks):
    prove(CPU, "auto")
    prove(GPU, "eager")
    prove(GPU, "triton")
    assert checks == []
    prove(GPU, "auto")
    prove(GPU, "auto")
    assert checks == [GPU]
    assert records.known(GPU) == record(**GOOD)


def test_invalid_record_is_replaced_and_the_reason_printed(checks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CONDDETR_CACHE", str(tmp_path))
    records.save(GPU, replace(record(**GOOD), identity={"device": "NVIDIA H100", "driver": "550.1"}))
    records.forget()
    monkeypatch.setattr(memory, "_tables", {"sm_90": None})
    prove(GPU, "auto")
    assert len(checks) == 1
    assert "because the record is not valid: its driver was 550.1, now none" in " ".join(
        capsys.readouterr().out.split()
    )


def test_architecture_with_a_table_needs_no_check(checks):
    memory._tables["sm_90"] = records.Table("sm_90", {}, record(**GOOD).verdicts)
    prove(GPU, "auto")
    assert checks == []


def test_restricted_record_allows_only_kernels_that_all_records_allow():
    first, second = record(**GOOD), record(**{**GOOD, "focal_loss": "wrong.", "linear_assignment": 2.0})
    second = replace(second, identity={"device": "NVIDIA A10"}, verdicts=second.verdicts[2:])
    refusals = {x.operation: x.refused for x in records.restricted(first, [second]).verdicts}
    assert refusals == {
        "conditional_attention": "on NVIDIA A10, used by another process: it is not checked.",
        "linear_assignment": "",
        "focal_loss": "on NVIDIA A10, used by another process: wrong.",
        "convolution": "",
    }
    assert records.restricted(first, []) == first


GPUS = {
    "one has no record of its kind": [("H100", "1", GOOD), ("H100", "1", None), ("A10", "1", None)],
    "two records of one kind": [
        ("H100", "1", None),
        ("H100", "1", {**GOOD, "focal_loss": "wrong."}),
        ("H100", "1", GOOD),
    ],
    "two drivers of one model": [
        ("H100", "1", {**GOOD, "focal_loss": "wrong."}),
        ("H100", "2", GOOD),
        ("A10", "1", None),
    ],
}
"""Case → for each process: GPU model, driver, and content of its record; None: no record."""


def agree(number: int, case: str, folder: Path) -> None:
    """One rank with its GPU. The simulated check accepts all kernels, except one on an A10."""
    model, driver, speedups = GPUS[case][number]
    identity = {"device": f"NVIDIA {model}", "driver": driver}
    records.identity = machine.identity = lambda device: identity
    machine.device_name = lambda device: identity["device"]
    machine.compute_capability = lambda device: "9.0"
    if speedups is not None:
        records.adopt(GPU, replace(record(**speedups), identity=identity))

    def check(device):
        (folder / f"checked-{number}").touch()
        overrides = {"focal_loss": "its numbers are wrong."} if model == "A10" else {}
        records.adopt(device, replace(record(**{**GOOD, **overrides}), identity=identity))

    module._check = check
    prove(GPU, "auto")
    reasons = [records.why_not(name, "triton", torch.device("cuda:0"), torch.float32) for name in GOOD]
    (folder / f"choices-{number}").write_text(str([reason is None for reason in reasons]))


def rank_agrees(folder: Path) -> None:
    """One process of a group."""
    with distributed.process_group("cpu"):
        for case in GPUS:
            records.forget()
            (folder / case).mkdir(exist_ok=True)
            agree(distributed.rank(), case, folder / case)


def test_processes_with_different_gpus_and_records_choose_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDDETR_CACHE", str(tmp_path / "cache"))
    finish(*start_ranks(3, rank_agrees, tmp_path))
    checked = {case: sorted(path.name for path in (tmp_path / case).glob("checked-*")) for case in GPUS}
    assert checked == dict(zip(GPUS, (["checked-2"], [], ["checked-2"]), strict=True))
    for case in GPUS:
        choices = {(tmp_path / case / f"choices-{number}").read_text() for number in range(3)}
        assert choices == {str([True, True, False, True])}, case


def test_default_backend_is_auto():
    assert conddetr.build("conditional-detr-tiny", num_classes=3).backend == "auto"
