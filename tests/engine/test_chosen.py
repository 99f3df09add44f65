"""The line that says what really runs, what a checkpoint keeps of it, and the check before a run."""

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
UNCHECKED = "it is not checked on this GPU: `conddetr check` does that"


def record(**speedups: float | str) -> Record:
    """Of an H100: operation → speed-up of Triton's kernels, or why they are refused."""
    verdicts = []
    for name, found in speedups.items():
        refused, speedup = (found, None) if isinstance(found, str) else ("", found)
        verdicts += [Verdict(name, "triton", x, refused, 0.5, speedup) for x in ("float32", "bfloat16")]
    return Record({"device": "NVIDIA H100"}, tuple(verdicts), False, "2026-11-29", {})


GOOD = {"conditional_attention": 2.1, "linear_assignment": 9.0, "focal_loss": 3.0, "convolution": 1.2}


@pytest.fixture
def on_gpu(monkeypatch):
    """Triton would run on a GPU; PyTorch's switches are as it ships them."""
    monkeypatch.setattr(registry, "why_not", lambda backend, *_, **__: None if backend == "triton" else "not built.")
    monkeypatch.setattr(module, "float32_products", lambda _: "TF32 as it is")


def line(backend: str = "auto", precision: str = "bfloat16", trains: bool = True, **options: object) -> str:
    return chosen(R50, backend, GPU, precision, trains=trains, **options).line()


def test_all_is_proven(on_gpu):
    with records.pretend(record(**GOOD)):
        assert line() == (
            "attention: triton (checked on NVIDIA H100, 2.1×), matching: triton (9.0×), loss: triton (3.0×), "
            "backbone: channels-last (1.2×), bfloat16, TF32 as it is"
        )
        assert line(trains=False, precision="float32") == (
            "attention: triton (checked on NVIDIA H100, 2.1×), backbone: channels-last (1.2×), float32, TF32 as it is"
        )
        assert "backbone: PyTorch, compiled" in line(compiled=True)


def test_nothing_is_proven(on_gpu):
    with records.pretend(None):
        assert line() == (
            f"attention: PyTorch ({UNCHECKED}), matching: PyTorch, loss: PyTorch, backbone: PyTorch, "
            "bfloat16, TF32 as it is"
        )


def test_one_kernel_is_refused(on_gpu):
    slow = {**GOOD, "conditional_attention": "it is slower than PyTorch here: 0.8× its speed."}
    with records.pretend(record(**slow)):
        assert line().startswith(
            "attention: PyTorch (it is slower than PyTorch here: 0.8× its speed), "
            "matching: triton (checked on NVIDIA H100, 9.0×), loss: triton (3.0×)"
        )


def test_any_other_kernel_that_is_refused_is_named(on_gpu):
    slow = {**GOOD, "add_norm": "it is slower than PyTorch here: 0.8× its speed.", "max_pool": 1.5}
    with records.pretend(record(**slow)):
        assert line().endswith(", TF32 as it is, not taken: add_norm (it is slower than PyTorch here: 0.8× its speed)")
        assert "not taken" not in line("triton")


def test_a_backend_by_name_needs_no_proof(on_gpu):
    with records.pretend(None):
        assert line("triton") == (
            "attention: triton, matching: triton, loss: triton, backbone: channels-last, bfloat16, TF32 as it is"
        )
        assert line("eager").startswith(
            "attention: PyTorch (backend eager), matching: PyTorch, loss: PyTorch, backbone: PyTorch, bf"
        )


def test_on_a_cpu(monkeypatch):
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


def test_on_a_cpu_the_reason_is_that_of_the_native_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if native.NOT_LOADED is None:
        assert chosen(R50, "auto", CPU, "bfloat16", trains=False).line() == (
            "attention: native, backbone: PyTorch (its kernels take float32, float64, not bfloat16), bfloat16"
        )
    said = chosen(PRESETS["detr-r50"], "triton", CPU, "float32", trains=True).line()
    assert said.startswith("attention: PyTorch (this operation has no such kernels), matching: PyTorch (its kernels ru")


def test_what_has_no_kernels_on_a_gpu_needs_no_reason(on_gpu):
    """Attention of the original DETR is PyTorch's there; of its losses kernels compute those of the boxes."""
    with records.pretend(record(**{**GOOD, "matched_box_loss": 4.0})):
        said = chosen(PRESETS["detr-r50"], "auto", GPU, "bfloat16", trains=True).line()
    assert said.startswith("attention: PyTorch, matching: triton (checked on NVIDIA H100, 9.0×), loss: triton (4.0×)")


def test_sizes_that_kernels_do_not_take_are_said(on_gpu):
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
def test_what_is_said_is_what_runs(preset, backend, precision, trains):
    if backend == "native" and native.NOT_LOADED is not None:
        pytest.skip(str(native.NOT_LOADED))
    said, ran = announced_and_recorded(preset, "cpu", precision, trains=trains, backend=backend)
    assert said == ran


def test_a_run_says_it_and_a_checkpoint_keeps_it(tmp_path, capsys):
    trainer = small_trainer(tmp_path, model_options={"backend": "auto"}, epochs=1)
    trainer.fit()
    assert trainer.chosen.line() in capsys.readouterr().out.splitlines()
    kept = read_checkpoint(tmp_path / "checkpoint.pt")["chosen"]
    assert kept == trainer.chosen.to_dict()
    assert kept["precision"] == "float32"
    assert kept.keys() == {"attention", "matching", "loss", "backbone", "precision"}


@pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
def test_a_resumed_run_says_what_is_computed_otherwise(tmp_path, monkeypatch):
    small_trainer(tmp_path, model_options={"backend": "auto"}, epochs=1).fit()
    same = small_trainer(tmp_path, model_options={"backend": "auto"}, epochs=2)
    same.resume(tmp_path / "checkpoint.pt")
    assert same.changes == []
    monkeypatch.setattr(native, "NOT_LOADED", "the native kernels are not built.")
    other = small_trainer(tmp_path, model_options={"backend": "auto"}, epochs=2)
    other.resume(tmp_path / "checkpoint.pt")
    assert other.changes == [
        "attention was by native, is by PyTorch: the native kernels are not built",
        "matching was by native, is by PyTorch: the native kernels are not built",
    ]


@pytest.fixture
def checks(monkeypatch) -> list:
    """What was checked; a check finds all kernels good."""
    found = []

    def check(device):
        found.append(device)
        records.adopt(device, record(**GOOD))

    monkeypatch.setattr(module, "_check", check)
    for place in (records, machine):
        monkeypatch.setattr(place, "identity", lambda device: {"device": "NVIDIA H100"})
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(machine, "compute_capability", lambda device: "9.0")
    monkeypatch.setattr(memory, "_lookups", {})
    monkeypatch.setattr(memory, "_tables", {"sm_90": None})
    return found


def test_a_gpu_of_which_nothing_is_known_is_checked_once(checks):
    prove(CPU, "auto")
    prove(GPU, "eager")
    prove(GPU, "triton")
    assert checks == []
    prove(GPU, "auto")
    prove(GPU, "auto")
    assert checks == [GPU]
    assert records.known(GPU) == record(**GOOD)


def test_a_record_that_does_not_hold_is_made_again_and_the_reason_said(checks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CONDDETR_CACHE", str(tmp_path))
    records.save(GPU, replace(record(**GOOD), identity={"device": "NVIDIA H100", "driver": "550.1"}))
    records.forget()
    monkeypatch.setattr(memory, "_tables", {"sm_90": None})
    prove(GPU, "auto")
    assert len(checks) == 1
    assert "as the record does not hold: its driver was 550.1, now none" in " ".join(capsys.readouterr().out.split())


def test_what_is_measured_on_the_architecture_needs_no_check(checks):
    memory._tables["sm_90"] = records.Table("sm_90", {}, record(**GOOD).verdicts)
    prove(GPU, "auto")
    assert checks == []


def test_a_record_of_several_kinds_lets_run_what_all_let_run():
    one, other = record(**GOOD), record(**{**GOOD, "focal_loss": "wrong.", "linear_assignment": 2.0})
    other = replace(other, identity={"device": "NVIDIA A10"}, verdicts=other.verdicts[2:])
    found = {x.operation: x.refused for x in records.restricted(one, [other]).verdicts}
    assert found == {
        "conditional_attention": "on NVIDIA A10, which another process has: it is not checked.",
        "linear_assignment": "",
        "focal_loss": "on NVIDIA A10, which another process has: wrong.",
        "convolution": "",
    }
    assert records.restricted(one, []) == one


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
"""Case → of each process the model of its GPU, the driver, and what its record says; None: it has none."""


def agree(number: int, case: str, folder: Path) -> None:
    """A rank with its GPU; a check finds all good but on an A10."""
    model, driver, found = GPUS[case][number]
    kind = {"device": f"NVIDIA {model}", "driver": driver}
    records.identity = machine.identity = lambda device: kind
    machine.device_name = lambda device: kind["device"]
    machine.compute_capability = lambda device: "9.0"
    if found is not None:
        records.adopt(GPU, replace(record(**found), identity=kind))

    def check(device):
        (folder / f"checked-{number}").touch()
        bad = {"focal_loss": "its numbers are wrong."} if model == "A10" else {}
        records.adopt(device, replace(record(**{**GOOD, **bad}), identity=kind))

    module._check = check
    prove(GPU, "auto")
    why = [records.why_not(name, "triton", torch.device("cuda:0"), torch.float32) for name in GOOD]
    (folder / f"found-{number}").write_text(str([reason is None for reason in why]))


def rank_agrees(folder: Path) -> None:
    """One process of a group."""
    with distributed.process_group("cpu"):
        for case in GPUS:
            records.forget()
            (folder / case).mkdir(exist_ok=True)
            agree(distributed.rank(), case, folder / case)


def test_processes_choose_the_same_whatever_gpus_and_records_they_have(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDDETR_CACHE", str(tmp_path / "cache"))
    finish(*start_ranks(3, rank_agrees, tmp_path))
    checked = {case: sorted(path.name for path in (tmp_path / case).glob("checked-*")) for case in GPUS}
    assert checked == dict(zip(GPUS, (["checked-2"], [], ["checked-2"]), strict=True))
    for case in GPUS:
        found = {(tmp_path / case / f"found-{number}").read_text() for number in range(3)}
        assert found == {str([True, True, False, True])}, case


def test_build_and_accelerate_prefer_by_default():
    assert conddetr.build("conditional-detr-tiny", num_classes=3).backend == "auto"
