"""Tuning records the fastest correct launch settings, which are used while the record holds; the clock is fake."""

import importlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

import conddetr
from conddetr.cli import main
from conddetr.kernels import records, registry
from conddetr.kernels.attn import triton as kernels
from conddetr.kernels.attn.triton import launch
from conddetr.kernels.attn.triton.launch import KERNELS, Form, Tiles, launch_settings
from conddetr.kernels.check import tuning
from conddetr.kernels.check.cases import attention
from conddetr.kernels.check.isolation import isolated
from conddetr.kernels.check.table import tuning_table
from conddetr.kernels.check.verify import Finding
from conddetr.kernels.records import Record

CPU = torch.device("cpu")
check_module = importlib.import_module("conddetr.kernels.check")
FORM = Form("half", 32, True, True, False)
SHIPPED = launch_settings(0, "half", 32, True, True, False)
FAST, SLOW, WRONG = Tiles(32, 16, 4, 2), Tiles(16, 16, 4, 1), Tiles(16, 32, 4, 1)
SECONDS = {FAST: 1.0, SLOW: 5.0, WRONG: 0.1}
SMALL = attention.Size(1, 20, 3, 6, 1, valid=((3, 5),))

pytestmark = pytest.mark.skipif(
    registry.why_not("triton", CPU, torch.float32) is not None, reason="no Triton that runs on a CPU"
)


def record(tuned):
    return Record(records.identity(CPU), (), False, datetime.now(UTC).isoformat(), tuned)


def subject(p=attention.P):
    problem = attention._separable("small", SMALL, p)
    return tuning.Subject(problem, torch.float32)


def seconds_of(settings):
    """Seconds of a setting on the fake clock: 2 for the shipped settings."""
    return SECONDS.get(settings, 2.0)


@pytest.fixture
def fake(monkeypatch):
    """One small variant, three candidates beside the shipped settings, and a fake clock. Nothing is computed; `WRONG`
    counts as wrong, alone and together with others. Returns the list of candidates.
    """
    tried = [FAST, SLOW, WRONG]

    def verify(problem, backend, dtype, device):
        tuned = records.load(device).tuned
        is_wrong = any(launch.read_tiles(key.split()[1][:-1], value) == WRONG for key, value in tuned.items())
        return Finding(2.0, "result is off by 2 times its error budget") if is_wrong else Finding(0.5, None)

    monkeypatch.setattr(tuning, "subjects", lambda device, dtypes: [subject()])
    monkeypatch.setattr(
        tuning, "settings_of", lambda device, form, kernel, shipped: list(dict.fromkeys([shipped, *tried]))
    )
    monkeypatch.setattr(tuning, "verify", verify)
    monkeypatch.setattr(tuning, "_pass", lambda inputs, kernel, settings: lambda: getattr(settings, kernel))
    monkeypatch.setattr(tuning, "seconds_of", lambda runs, device: [seconds_of(run()) for run in runs])
    return tried


def tune():
    with isolated(CPU):
        return tuning.tune(CPU, [torch.float32], lambda *step: None)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_fastest_correct_setting_is_recorded_in_any_order(fake, order):
    fake[:] = [fake[index] for index in order]
    result = tune()
    assert result.settings() == {FORM.key(kernel): launch.write_tiles(FAST) for kernel in KERNELS}
    assert [choice.speedup for choice in result.choices] == [2.0] * 3
    assert [choice.shipped for choice in result.choices] == [getattr(SHIPPED, kernel) for kernel in KERNELS]
    assert result.left_out == [
        f"{FORM.key(kernel)}: {WRONG.described()}: result is off by 2 times its error budget" for kernel in KERNELS
    ]


def test_shipped_settings_are_recorded_if_fastest(fake):
    fake[:] = [SLOW]
    result = tune()
    assert result.settings() == {FORM.key(kernel): launch.write_tiles(getattr(SHIPPED, kernel)) for kernel in KERNELS}
    assert [choice.speedup for choice in result.choices] == [1.0] * 3
    assert "shipped" in tuning_table(result).columns[-1]._cells


def test_nothing_is_recorded_if_every_setting_is_wrong(fake, monkeypatch):
    monkeypatch.setattr(tuning, "verify", lambda *_: Finding(2.0, "raises OutOfResources: shared memory"))
    result = tune()
    assert result.settings() == {}
    assert len(result.left_out) == 3 * 4


def test_settings_that_are_wrong_only_together_are_not_recorded(fake, monkeypatch):
    def verify(*_):
        is_wrong = len(records.load(CPU).tuned) == 3
        return Finding(2.0, "result is not finite") if is_wrong else Finding(0.5, None)

    monkeypatch.setattr(tuning, "verify", verify)
    result = tune()
    assert result.choices == []
    assert result.left_out == ["attention with the fastest of each kernel, half, 32 channels, separable, dropout: "
                               "result is not finite"]  # fmt: skip


def test_settings_that_fail_during_measurement_are_not_recorded(fake, monkeypatch):
    def fail(runs, device):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(tuning, "seconds_of", fail)
    result = tune()
    assert result.choices == []
    assert "the measurement raises RuntimeError: illegal memory access" in result.left_out[-1]
    monkeypatch.setattr(tuning.Subject, "inputs", lambda self, device: fail(None, device))
    assert tune().left_out == ["attention, small, float32: raises RuntimeError: illegal memory access"]


def test_real_kernels_are_verified(monkeypatch):
    """One of two settings gives wrong results; they are verified as in the check, on Triton's interpreter."""
    forward = kernels.forward

    def sabotaged(inputs, settings=None):
        out, lse = forward(inputs, settings)
        return (out * 1.01 if inputs.launch().forward == WRONG else out), lse

    monkeypatch.setattr(kernels, "forward", sabotaged)
    monkeypatch.setattr(tuning, "subjects", lambda device, dtypes: [subject()])
    monkeypatch.setattr(
        tuning, "settings_of", lambda device, form, kernel, shipped: [shipped, WRONG if kernel == "forward" else FAST]
    )
    monkeypatch.setattr(
        tuning, "measurements", lambda runs, device, seconds: [[9.0, 1.0 + number, 0.0] for number in range(len(runs))]
    )
    result = tune()
    assert [choice.fastest for choice in result.choices] == [getattr(SHIPPED, kernel) for kernel in KERNELS]
    [line] = result.left_out
    assert line.startswith(f"{FORM.key('forward')}: {WRONG.described()}: result is ")
    assert line.endswith("times its error budget")


def inputs(separable=True, dropout=True):
    make = attention._separable if separable else attention._dense
    problem = make("small", SMALL, attention.P if dropout else 0.0)
    with isolated(CPU):
        return tuning.Subject(problem, torch.float32).inputs(CPU)


def test_record_changes_only_the_settings_it_has():
    tuned = {FORM.key("forward"): launch.write_tiles(FAST), "other": {"of": "a later release"}}
    with records.pretend(record(tuned)):
        assert inputs().launch() == replace(SHIPPED, forward=FAST)
        for separable, dropout in ((True, False), (False, True), (False, False)):
            shipped = launch_settings(0, "half", 32, separable, dropout, False)
            assert inputs(separable, dropout).launch() == shipped
        # Kernels compiled ahead of time for another architecture ignore the record.
        assert launch_settings(90, "half", 32, True, True, False).forward != FAST
    assert inputs().launch() == SHIPPED
    with records.pretend(None):
        assert inputs().launch() == SHIPPED


def test_tuned_settings_compute_the_same(monkeypatch):
    launched = []
    options = kernels.Inputs.options

    def recorded(self, tiles):
        launched.append(tiles)
        return options(self, tiles)

    problem = subject(0.0).problem
    monkeypatch.setattr(kernels.Inputs, "options", recorded)
    form = replace(FORM, dropout=False)
    with records.pretend(record({form.key(kernel): launch.write_tiles(FAST) for kernel in KERNELS})), isolated(CPU):
        assert tuning.verify(problem, "triton", torch.float32, CPU).wrong is None
    assert set(launched) == {FAST}


def test_record_is_looked_up_once(monkeypatch):
    made, lookups = inputs(), []
    load = records.load
    monkeypatch.setattr(records, "load", lambda device: lookups.append(device) or load(device))
    with records.pretend(record({FORM.key("forward"): launch.write_tiles(FAST)})):
        for _ in range(3):
            assert made.launch().forward == FAST
        assert lookups == [CPU]
    records.adopt(CPU, record({FORM.key("forward"): launch.write_tiles(SLOW)}))
    try:
        assert made.launch().forward == SLOW
    finally:
        records.forget()


@pytest.mark.parametrize(
    "changed",
    [
        {"queries": 48},
        {"queries": 64.0},
        {"queries": True},
        {"keys": 128},
        {"keys": "64"},
        {"keys": None},
        {"warps": 0},
        {"warps": 3},
        {"stages": -1},
        {"stages": [2]},
        {"registers": 100.5},
        {"registers": 7},
        {"ahead": 1},
        {"ahead": None},
        {"clusters": 2},
    ],
    ids=str,
)
def test_ill_formed_settings_are_ignored(changed):
    good = launch.write_tiles(Tiles(32, 32, 4, 2, 128, True))
    assert launch.read_tiles("forward", good) == Tiles(32, 32, 4, 2, 128, True)
    with pytest.raises(ValueError, match=r"^forward: "):
        launch.read_tiles("forward", {**good, **changed})
    tuned = {FORM.key("forward"): {**good, **changed}, FORM.key("backward_key"): launch.write_tiles(FAST)}
    with records.pretend(record(tuned)):
        assert inputs().launch() == replace(SHIPPED, backward_key=FAST)


@pytest.mark.parametrize("stored", [None, [], "64", 64, {}, {"queries": 64, "keys": 64, "warps": 4}], ids=str)
def test_values_that_are_no_settings_are_ignored(stored):
    with records.pretend(record({FORM.key(kernel): stored for kernel in KERNELS})):
        assert inputs().launch() == SHIPPED


def test_only_the_forward_kernel_computes_scores_ahead():
    with pytest.raises(ValueError, match="backward_key: ahead: only the forward kernel"):
        launch.read_tiles("backward_key", launch.write_tiles(Tiles(64, 64, 4, 3, ahead=True)))


def test_settings_round_trip_through_a_record():
    for tiles in (FAST, Tiles(64, 32, 8, 3, 96), Tiles(64, 32, 4, 1, ahead=True)):
        stored = json.loads(record({"key": launch.write_tiles(tiles)}).to_json())["content"]["tuned"]["key"]
        assert launch.read_tiles("forward", stored) == tiles


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 120])
def test_shipped_settings_are_among_the_candidates(architecture):
    """On sm_100 the shipped settings are Hopper's. They are tried but not listed: see the next test."""
    used = set()
    for kernel, products, *form in product(KERNELS, ("half", "tf32"), *[(False, True)] * 3):
        wanted = Form(products, 32, *form)
        candidates = launch.candidates(architecture, kernel, wanted)
        assert getattr(launch_settings(architecture, products, 32, *form), kernel) in candidates
        assert 3 <= len(set(candidates)) == len(candidates) <= 4
        used.add(launch.candidates_key(architecture, kernel, wanted))
    prefix = "Hopper" if architecture == 90 else "other"
    assert used == {key for key in json.loads(launch.CANDIDATES.read_text())["settings"] if key.startswith(prefix)}


def test_shipped_settings_are_tried_first(monkeypatch):
    for capability in ((9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(registry, "capability", lambda device, result=capability: result)
        shipped = launch_settings(10 * capability[0], "tf32", 32).backward_query
        tried = tuning.settings_of(CPU, replace(FORM, products="tf32"), "backward_query", shipped)
        assert tried[0] == shipped
        assert 3 <= len(tried) == len(set(tried)) <= 5


def test_every_form_has_its_own_key():
    forms = [
        Form(*values) for values in product(("half", "tf32"), (32, 128), (False, True), (False, True), (False, True))
    ]
    assert len({form.key(kernel) for form in forms for kernel in KERNELS}) == 3 * len(forms)
    assert Form("half", 20, True, False, False).key("forward") == "attention forward, half, 32 channels, separable"


def test_forms_are_those_of_the_model(monkeypatch):
    """With 132 multiprocessors eight images give few blocks, and ten give many; with 40, eight give many."""
    for multiprocessors, expected in ((132, (8, 10)), (40, (8, 1))):
        monkeypatch.setattr(registry, "multiprocessors", lambda device, count=multiprocessors: count)
        assert tuning._batches(CPU) == expected
        subjects = tuning.subjects(CPU, [torch.float32, torch.float16, torch.bfloat16])
        assert len(subjects) == 2 * 2 * 4
        assert {x.dtype for x in subjects} == {torch.bfloat16, torch.float32}
        assert all(x.problem.is_tf32 == (x.dtype == torch.float32) for x in subjects)
    assert {x.dtype for x in tuning.subjects(CPU, [torch.float16])} == {torch.float16}


@pytest.fixture
def on_a_cpu(fake, monkeypatch, tmp_path):
    """Makes the CPU tunable; the check has one problem of attention."""
    monkeypatch.setenv("CONDDETR_CACHE", str(tmp_path))
    records.forget()
    problem = replace(attention._separable("small", SMALL), is_model=False)
    monkeypatch.setattr(check_module, "problems", lambda images: [problem])
    monkeypatch.setattr(check_module, "backends", lambda operation: ("triton",))
    monkeypatch.setattr(check_module, "_check_tunable", lambda device: None)
    monkeypatch.setattr(check_module, "_why_not", lambda row, device: None)
    monkeypatch.setattr(check_module, "judge", lambda row, device, tell: row.verdict("", 0.5, None))
    yield
    records.forget()


def test_record_keeps_the_tuned_settings(on_a_cpu):
    expected = {FORM.key(kernel): launch.write_tiles(FAST) for kernel in KERNELS}
    assert conddetr.kernels.check("cpu", tune=True, dtypes=[torch.float32]).tuned == expected
    records.forget()
    assert records.load(CPU).tuned == expected
    assert inputs().launch().forward == FAST
    assert conddetr.kernels.check("cpu", dtypes=[torch.float32]).tuned == expected, "a later check without tuning"


def test_settings_that_fail_at_some_size_are_not_kept(on_a_cpu, monkeypatch):
    def judge(row, device, tell):
        wrong = "odd widths: result is not finite." if records.load(device).tuned else ""
        return row.verdict(wrong, 0.5, None)

    monkeypatch.setattr(check_module, "judge", judge)
    report = check_module.examine("cpu", tune=True, dtypes=[torch.float32])
    assert report.record.tuned == {}
    assert [x.refused for x in report.record.verdicts] == [""]
    assert report.tuning.left_out[-1] == (
        "no setting is tuned: with the fastest settings, conditional_attention is refused in float32: odd widths: "
        "result is not finite."
    )


def test_nothing_is_judged_again_after_a_gpu_failed(on_a_cpu, monkeypatch):
    judged = []

    def judge(row, device, tell):
        judged.append(row)
        monkeypatch.setattr(check_module, "_stopped", lambda device, title: f"the GPU failed at {title}")
        return row.verdict("raises AcceleratorError.", None, None)

    monkeypatch.setattr(check_module, "judge", judge)
    report = check_module.examine("cpu", tune=True, dtypes=[torch.float32])
    assert len(judged) == 1
    assert report.record.tuned == {}
    assert [x.refused for x in report.record.verdicts] == ["the GPU failed at launch settings of attention"]


def test_command_prints_the_fastest_settings(on_a_cpu, capsys):
    assert main(["check", "--tune", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "launch settings of attention" in printed
    assert printed.count("32×16, 4 warps, 2 stages") == 3
    assert printed.count("2.00×") == 3
    assert "left out: attention forward, half, 32 channels, separable, dropout: 16×32, 4 warps, 1 stage: " in printed


def test_nothing_is_tuned_on_a_cpu(capsys):
    with pytest.raises(ValueError, match="tune: only GPU kernels have launch settings, and the device is cpu"):
        conddetr.kernels.check("cpu", tune=True)
    assert main(["check", "--tune", "--device", "cpu"]) != 0
    assert "only GPU kernels have launch settings" in capsys.readouterr().err
