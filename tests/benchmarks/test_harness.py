"""Timing, refusals, result files, tables, and the page that is written from them."""

import argparse
import json
import time
import warnings

import harness
import machine
import pytest
import report
import torch

OPTIONS = argparse.Namespace(rounds=4, cudagraph=False, seconds=60.0)
WORK = harness.Work(flops=4e9, bytes=2e8, floors={"bytes": 1e-3, "products": 2e-3})
RESULT = harness.Result("one", {"peer": [4e-3] * 5, "slow peer": [8e-3] * 5, "ours": [3e-3] * 5}, WORK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="calls on a GPU are timed by its own events")
def test_samples_are_the_time_of_the_call():
    result = harness.measure("sleep", {"long": lambda: time.sleep(0.02), "short": lambda: None}, OPTIONS, None, {})
    assert [len(samples) for samples in result.seconds.values()] == [4, 4]
    assert all(sample >= 0.02 for sample in result.seconds["long"])
    assert min(result.seconds["short"]) < 0.01


def test_too_little_memory_is_a_refusal(monkeypatch):
    def peak(run):
        if run is None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nand much more")
        return 5

    monkeypatch.setattr(harness, "_peak_extra_bytes", peak)
    refused = {"other": "not installed"}
    assert harness._peaks({"small": lambda: None, "big": None}, refused) == {"small": 5}
    assert refused == {"other": "not installed", "big": "CUDA out of memory. Tried to allocate 9 GiB."}


def test_reasons_are_pytorchs_own():
    def forced():
        warnings.warn("Flash attention kernel not used because: (Triggered internally at sdp.h:1.)", stacklevel=1)
        warnings.warn("Flash attention does not support a mask. (Triggered internally at sdp.h:2.)", stacklevel=1)
        warnings.warn("CuDNN attention has been runtime disabled. (Triggered internally at sdp.h:3.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    def broken():
        raise RuntimeError("out of memory\nand much more")

    good, refused = harness.usable({"flash": forced, "big": broken}, lambda call: call(), {}, is_random=False)
    assert good == {}
    assert refused == {"flash": "Flash attention does not support a mask.", "big": "out of memory"}


def test_ours_is_held_to_twice_the_error_and_a_peer_to_ten_times():
    def off(by):
        return lambda: {"out": torch.full((3,), 1.0 + by)}

    exact = {"out": torch.ones(3, dtype=torch.float64)}
    runs = {"eager": off(1e-3), "ours": off(1.9e-3), "rough peer": off(9e-3), "wrong peer": off(11e-3)}
    good, refused = harness.usable(runs, lambda call: call(), exact, is_random=False)
    assert list(good) == ["eager", "ours", "rough peer"]
    assert refused == {"wrong peer": "wrong answer: error of out 1.10e-02, eager 1.00e-03"}
    with pytest.raises(SystemExit, match=r"ours: error of out 2.10e-03, eager 1.00e-03: not timing a wrong answer"):
        harness.usable({"eager": off(1e-3), "ours": off(2.1e-3)}, lambda call: call(), exact, is_random=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch gives its reasons on a GPU only")
def test_flash_says_why_it_refuses_a_mask():
    import attn

    problem = attn.Problem("r50", 2, torch.bfloat16, 0.0, padded=True, backward=False)
    tensors = problem.make()
    runs = {"flash": attn.implementations(problem, tensors)["SDPA, flash, padded values"]}
    reason = harness.usable(runs, lambda call: call(), {}, is_random=False)[1]["flash"]
    assert "mask" in reason


def test_table():
    headings, lines = harness.rows(RESULT)
    assert headings == ["implementation", "ms", "10–90 %", "vs best peer", "TFLOP/s", "GB/s", "× floor", "of peak"]
    assert lines[0] == ["peer", "4", "4–4", "1.00", "1", "50", "2.00", "50%"]
    assert lines[2] == ["ours", "3", "3–3", "1.33", "1.33", "66.7", "1.50", "67%"]
    assert harness.floors_line(WORK) == "floor: products 2 ms, bytes 1 ms"


def test_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    runs = {"first": lambda: RESULT, "second": lambda: pytest.fail("begun after the time was up")}
    harness.run_all("some", runs, argparse.Namespace(cudagraph=False, seconds=0.0))
    (path,) = tmp_path.glob("*/*")
    assert path.name == "some.json"
    assert json.loads(path.read_text())["left_out"] == ["second"]
    assert harness.read_results(path) == [RESULT]


def test_a_machine_without_git_and_nvidia_smi(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == "unknown"
    assert {"driver", "max SM clock", "triton", "system", "CPU threads"} <= set(machine.environment())


def test_samples_keep_four_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    path = harness.write_results("some", {}, [harness.Result("one", {"peer": [0.00123456789, 2.0]})], [])
    assert harness.read_results(path)[0].seconds == {"peer": [0.001235, 2.0]}
    assert '"peer": [ 0.001235, 2.0 ]' in path.read_text()


def test_picture_and_tables_come_from_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    results = [RESULT, harness.Result("two", {"peer": [1.0] * 3}, refused={"ours": "too wide"})]
    path = harness.write_results("some", {}, results, [])
    page = report.markdown(tmp_path)
    assert "| one | 4 | 8 | **3** | 1.33× | 1.5 |" in page
    assert "| two | **1000** | – | – | – | – |" in page
    assert "- ours: too wide" in page
    assert report.draw(path).read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_committed_results():
    page = report.DOCS.read_text()
    shown = page.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert shown == report.markdown(harness.RESULTS), "run: python benchmarks/report.py"
