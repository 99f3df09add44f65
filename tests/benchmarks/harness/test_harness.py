"""Timing, refusals, result files, tables, and the generated page of results."""

import argparse
import ast
import contextlib
import json
import math
import time
import warnings

import pytest
import torch
import triton

from conddetr.kernels.registry import BackendError
from harness import benchmark, check, machine, memory, rates, report, show, store, timing
from harness.refusals import PROBLEM
from harness.result import Result, Work

OPTIONS = argparse.Namespace(rounds=4, cudagraph=False, seconds=60.0)
WORK = Work(flops=4e9, bytes=2e8, floors={"bytes": 1e-3, "products": 2e-3})
RESULT = Result("one", {"peer": [4e-3] * 5, "slow peer": [8e-3] * 5, "ours": [3e-3] * 5}, WORK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="calls on a GPU are timed by device events")
def test_samples_are_the_time_of_the_call():
    result = timing.measure("sleep", {"long": lambda: time.sleep(0.02), "short": lambda: None}, OPTIONS, None, {})
    assert [len(samples) for samples in result.seconds.values()] == [4, 4]
    assert all(sample >= 0.02 for sample in result.seconds["long"])
    assert min(result.seconds["short"]) < 0.01


def test_out_of_memory_is_a_refusal(monkeypatch):
    def peak(run):
        if run is None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nand much more")
        return 5

    monkeypatch.setattr(memory, "_peak_extra_bytes", peak)
    refused = {"other": "not installed"}
    assert memory.peaks({"small": lambda: None, "big": None}, refused) == {"small": 5}
    assert refused == {"other": "not installed", "big": "CUDA out of memory. Tried to allocate 9 GiB."}


def test_reasons_are_quoted_from_pytorch():
    def forced():
        warnings.warn("Flash attention kernel not used because: (Triggered internally at sdp.h:1.)", stacklevel=1)
        warnings.warn("Flash attention does not support a mask. (Triggered internally at sdp.h:2.)", stacklevel=1)
        warnings.warn("CuDNN attention has been runtime disabled. (Triggered internally at sdp.h:3.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    def broken():
        raise RuntimeError("out of memory\nand much more")

    good, refused = check.usable({"flash": forced, "big": broken}, lambda call: call(), {}, is_random=False)
    assert good == {}
    assert refused == {"flash": "Flash attention does not support a mask.", "big": "out of memory"}


def test_ours_may_have_twice_the_error_and_a_peer_ten_times():
    def off(by):
        return lambda: {"out": torch.full((3,), 1.0 + by)}

    exact = {"out": torch.ones(3, dtype=torch.float64)}
    runs = {"eager": off(1e-3), "ours": off(1.9e-3), "rough peer": off(9e-3), "wrong peer": off(11e-3)}
    good, refused = check.usable(runs, lambda call: call(), exact, is_random=False)
    assert list(good) == ["eager", "ours", "rough peer"]
    assert refused == {"wrong peer": "wrong answer: error of out 1.10e-02, eager 1.00e-03"}
    _, refused = check.usable({"eager": off(1e-3), "ours": off(2.1e-3)}, lambda call: call(), exact, is_random=False)
    assert refused == {"ours": "wrong answer: error of out 2.10e-03, eager 1.00e-03"}


def raising(error):
    def run():
        raise error

    return run


def test_no_exception_stops_the_other_implementations(capsys):
    """Peers use assertions, and Triton's errors are no RuntimeErrors."""
    quoted = triton.CompilationError("def kernel():\n    a + b", ast.parse("a + b").body[0], None)
    quoted.__cause__ = ValueError("shapes\ndo not match")
    errors = {
        "peer, narrow": AssertionError("head_dim: 64 expected"),
        "peer, silent": AssertionError(),
        "peer, compiled": quoted,
        "ours, too large": triton.runtime.errors.OutOfResources(300, 200, "shared memory"),
        "ours, absent": BackendError("backend 'native' cannot run here: not built."),
    }
    runs = {"eager": lambda: {}, **{name: raising(error) for name, error in errors.items()}, "ours": lambda: {}}
    good, refused = check.usable(runs, lambda call: call(), {}, is_random=False)
    assert list(good) == ["eager", "ours"]
    too_large = refused.pop("ours, too large")
    assert too_large.startswith("failed: OutOfResources: out of resource: shared memory, Required: 300")
    assert refused == {
        "peer, narrow": "AssertionError: head_dim: 64 expected",
        "peer, silent": "AssertionError",
        "peer, compiled": "ValueError: do not match",
        "ours, absent": "backend 'native' cannot run here: not built.",
    }
    # A failure of ours is unexpected: the traceback is printed, and the failure is reported at the end.
    assert "in run\n    raise error" in capsys.readouterr().err
    result = Result("one", {}, refused={**refused, "ours, too large": too_large})
    assert benchmark.failures([result]) == [f"one: ours, too large: {too_large}"]


def test_nothing_is_correct_without_its_reference():
    exact = {"out": torch.ones(3, dtype=torch.float64)}
    for spoiled in (raising(RuntimeError("out of luck")), lambda: {"out": torch.full((3,), torch.nan)}):
        runs = {"eager": spoiled, "ours": lambda: {"out": torch.ones(3)}}
        good, refused = check.usable(runs, lambda call: call(), exact, is_random=False)
        assert good == {}
        assert refused["ours"] == "not checked: eager, which it is compared with, is refused"
        assert len(benchmark.failures([Result("one", {}, refused=refused)])) == 1


def test_failure_during_timing_does_not_affect_the_others():
    calls = iter(range(100))

    def breaks():
        if next(calls) == 4:
            raise RuntimeError("broken")

    result = timing.measure("some", {"breaks": breaks, "works": lambda: None}, OPTIONS, None, {})
    assert {name: len(samples) for name, samples in result.seconds.items()} == {"works": 4}
    assert result.refused == {"breaks": "broken"}


def test_failures_are_reported_after_everything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    wrong = Result("wrong", {"peer": [1.0]}, refused={"ours": "wrong answer: by far", "peer 2": "too old"})
    runs = {"broken": raising(MemoryError("too little")), "wrong": lambda: wrong, "right": lambda: RESULT}
    with pytest.raises(SystemExit) as stop:
        benchmark.run_all("some", runs, argparse.Namespace(cudagraph=False, seconds=60.0))
    assert stop.value.code.splitlines() == [
        f"broken: {PROBLEM}: failed: MemoryError: too little",
        "wrong: ours: wrong answer: by far",
    ]
    (path,) = tmp_path.glob("*/*")
    assert [result.title for result in store.read_results(path)] == ["broken", "wrong", "one"]
    # A problem without times has an empty row on the page.
    assert "| broken | – | – | – |" in report.markdown(tmp_path)
    assert report.draw(path).exists()


class Device:
    """The part of `torch.cuda` that the clock uses; records the calls in order."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(rates, "DEVICE", torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: argparse.Namespace(L2_cache_size=1))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.calls.append("wait"))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self)

    def record(self):
        self.calls.append("event")

    def elapsed_time(self, end):
        return 3.0


def test_the_gpu_is_idle_when_a_call_begins(monkeypatch):
    device = Device(monkeypatch)
    timed = rates._device_clock()
    for name in ("one", "other"):
        assert timed(lambda name=name: device.calls.append(name)) == 3e-3
    assert device.calls == ["wait", "event", "one", "event", "wait", "event", "other", "event", "wait"]


@pytest.fixture(params=[True, False])
def switch(request):
    """The setting of both of PyTorch's TF32 switches."""
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = request.param
    yield request.param
    for switch, was in zip(switches, before, strict=True):
        switch.allow_tf32 = was


def test_tf32_is_off_inside_and_restored_outside(switch, monkeypatch):
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    monkeypatch.setattr(machine, "DEVICE", torch.device("cuda"))
    outside = (conv.fp32_precision, matmul.fp32_precision)
    with contextlib.suppress(ZeroDivisionError), machine.without_tf32():
        # Both generations of switches agree; PyTorch requires that when the older ones are read.
        assert (torch.backends.cudnn.allow_tf32, matmul.allow_tf32) == (False, False)
        assert "tf32" not in (conv.fp32_precision, matmul.fp32_precision)
        assert machine.tf32() == "off"
        raise ZeroDivisionError
    assert (conv.fp32_precision, matmul.fp32_precision) == outside
    assert machine.tf32() == ("on for products and convolutions" if switch else "off")


def test_titles_and_environment_report_tf32(monkeypatch):
    monkeypatch.setattr(machine, "DEVICE", torch.device("cuda"))
    assert machine.dtype_name(torch.float32) == "float32, TF32 off"
    assert machine.dtype_name(torch.bfloat16) == "bfloat16"
    monkeypatch.setattr(machine, "DEVICE", torch.device("cpu"))
    assert machine.dtype_name(torch.float32) == "float32"
    assert machine.environment()["TF32"] == "none"


def test_benchmarks_run_without_tf32(switch, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    seen = []

    def run():
        seen.append(torch.backends.cudnn.allow_tf32)
        return RESULT

    benchmark.run_all("some", {"one": run}, argparse.Namespace(cudagraph=False, seconds=60.0))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == switch


def test_compiled_and_graphed_runs_replace_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    for options in ({}, {"compiled": True}, {"cudagraph": True}, {"compiled": False}):
        options = argparse.Namespace(**{"cudagraph": False, "seconds": 60.0, **options})
        benchmark.run_all("some", {"one": lambda: RESULT}, options)
    names = {path.name for path in tmp_path.rglob("*.json")}
    assert names == {"some.json", "some-compiled.json", "some-cudagraph.json"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch gives its reasons only on a GPU")
def test_flash_gives_its_reason_against_a_mask():
    from ops import attn

    problem = attn.Problem("r50", 2, torch.bfloat16, 0.0, padded=True, backward=False)
    tensors = problem.make()
    runs = {"flash": problem.implementations(tensors)["SDPA, flash, padded values"]}
    reason = check.usable(runs, lambda call: call(), {}, is_random=False)[1]["flash"]
    assert "mask" in reason


def test_table_of_one_result():
    headings, lines = show.rows(RESULT)
    assert headings == ["implementation", "ms", "10–90 %", "vs best peer", "TFLOP/s", "GB/s", "× floor", "of peak"]
    assert lines[0] == ["peer", "4", "4–4", "1.00", "1", "50", "2.00", "50%"]
    assert lines[2] == ["ours", "3", "3–3", "1.33", "1.33", "66.7", "1.50", "67%"]
    assert show.floors_line(WORK) == "floor: products 2 ms, bytes 1 ms"


def test_printed_table_cuts_no_figure_off(capsys):
    """With all columns, and a name that leaves them no room on one line."""
    seconds = {"HuggingFace, channels-last, compiled": [3.5714] * 5, "ours, HuggingFace accelerated": [2.389] * 5}
    work = Work(flops=4e9, bytes=2e8, floors={"products": 1.45})
    result = Result("one", seconds, work, dict.fromkeys(seconds, 2**30), images=2)
    headings, lines = show.rows(result)
    assert len(headings) == 10
    show.print_table(result)
    printed = capsys.readouterr().out
    assert "…" not in printed
    for cell in (cell for line in lines for cell in line[1:]):
        assert f" {cell} " in printed


def test_memory_at_capture_is_marked():
    memory = {"slow peer": 2**20, "ours": 2**21}
    result = Result("one", RESULT.seconds, None, memory, captured=["ours"])
    headings, lines = show.rows(result)
    assert [line[headings.index("extra MiB")] for line in lines] == ["–", "1.0", "2.0 at capture"]


def test_null_gpu_has_no_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "device_name", lambda: "NVIDIA H100 80GB HBM3 (null)")
    exact = {"out": torch.ones(3, dtype=torch.float64)}
    runs = {"eager": lambda: {"out": torch.ones(3)}, "ours": lambda: {"out": torch.zeros(3)}}
    good, refused = check.usable(runs, lambda call: call(), exact, is_random=False)
    assert (list(good), refused) == (["eager", "ours"], {})
    result = timing.measure("one", good, OPTIONS, WORK, {"peer": "too old"})
    assert result.seconds == {"eager": [], "ours": []}
    assert rates._rate(1e9, lambda: None) == math.inf
    benchmark.run_all("some", {"one": lambda: result}, argparse.Namespace(cudagraph=False, seconds=60.0))
    printed = capsys.readouterr().out
    for part in ("one", "eager", "ours", "peer: too old", show.NOT_COMPARED, "wrote no result file: null GPU"):
        assert part in printed
    assert "ms" not in printed
    assert list(tmp_path.iterdir()) == []


def test_no_committed_result_is_from_a_null_gpu():
    assert [folder.name for folder in store.RESULTS.iterdir() if folder.name.endswith("-null")] == []


def test_no_problem_starts_after_the_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    runs = {"first": lambda: RESULT, "second": lambda: pytest.fail("started after the time limit")}
    benchmark.run_all("some", runs, argparse.Namespace(cudagraph=False, seconds=0.0))
    (path,) = tmp_path.glob("*/*")
    assert path.name == "some.json"
    assert json.loads(path.read_text())["left_out"] == ["second"]
    assert store.read_results(path) == [RESULT]


def test_environment_without_git_and_nvidia_smi(monkeypatch):
    monkeypatch.delenv("CONDDETR_COMMIT", raising=False)
    monkeypatch.setattr(machine, "_output", lambda *command: "1234567" if command[1] == "rev-parse" else "")
    assert machine.commit() == "1234567"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CONDDETR_COMMIT", raising=False)
    assert machine.commit() == "unknown"
    monkeypatch.setenv("CONDDETR_COMMIT", "7654321")
    assert machine.commit() == "7654321"
    environment = machine.environment()
    assert {"driver", "max SM clock", "triton", "system", "CPU threads"} <= set(environment)
    assert (environment["compute capability"] == "none") == (machine.DEVICE.type == "cpu")


def test_samples_keep_four_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    path = store.write_results("some", {}, [Result("one", {"peer": [0.00123456789, 2.0]})], [])
    assert store.read_results(path)[0].seconds == {"peer": [0.001235, 2.0]}
    assert '"peer": [ 0.001235, 2.0 ]' in path.read_text()


def test_chart_and_tables_come_from_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    results = [RESULT, Result("two", {"peer": [1.0] * 3}, refused={"ours": "too wide"})]
    path = store.write_results("some", {}, results, [])
    page = report.markdown(tmp_path)
    assert "| one | 4 | 8 | **3** | 1.33× | 1.5 |" in page
    assert "| two | **1000** | – | – | – | – |" in page
    assert "- ours: too wide" in page
    assert report.draw(path).read_bytes().startswith(b"\x89PNG")


def test_page_shows_the_committed_results():
    page = (store.RESULTS / report.PAGE).read_text()
    assert page == report.markdown(store.RESULTS), "run: python benchmarks/run.py report"
