"""Preflight runs the largest batch and changes nothing."""

import copy
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import batches, small_trainer

import conddetr
from conddetr.data.loader import make_loader
from conddetr.data.synthetic import SyntheticShapes
from conddetr.engine import memory
from conddetr.engine.preflight import MOST_TRIALS, largest, preflight

CPU = torch.device("cpu")
GIB = 2**30


def loss_with(model, seen):
    criterion = conddetr.build_criterion(model)

    def loss_of(batch):
        seen.append((model.training, tuple(batch.images.shape), batch.counts))
        return criterion(model(batch.model_input(), valid_hw=batch.valid_hw), batch.targets)["loss"]

    return loss_of


def test_largest_batch_runs_and_nothing_changes():
    model = conddetr.build("conditional-detr-tiny", num_classes=3, dropout=0.1).eval()
    before, state, seen = copy.deepcopy(model.state_dict()), torch.get_rng_state(), []
    loader = make_loader(SyntheticShapes(8, seed=1, image_size=100), 2, train=True, pad_buckets=2)
    assert loader.sampler.largest_shape() == (128, 128)
    optimizer = torch.optim.AdamW(model.parameters())
    line = preflight(model, loss_with(model, seen), optimizer, loader.sampler.largest_shape(), 2, CPU)
    assert seen[-1] == (True, (2, 3, 128, 128), (25, 25))
    assert line.startswith("preflight: 2 images of 128×128 with 25 objects each take ")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


class Machine:
    """A machine on which a batch needs 1 GiB and 2 GiB per image, or half of that with recomputation."""

    def __init__(self, monkeypatch, has):
        self.model = conddetr.build("conditional-detr-tiny", num_classes=3)
        self.has, self.tried, self.peak = has, [], 0
        monkeypatch.setattr(memory, "limit", lambda device: None if has is None else has * GIB)
        monkeypatch.setattr(memory, "peak", lambda device: self.peak)

    def step(self, batch):
        self.tried.append(len(batch))
        self.peak = int((1 + 2 * len(batch)) * GIB / (2 if self.model.transformer.encoder.recomputes else 1))
        if self.has is not None and self.peak > self.has * GIB:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.model.class_embed.weight.sum()

    def preflight(self, images):
        # One moment that is there already: AdamW needs no more.
        optimizer = SimpleNamespace(state=[1])
        return preflight(self.model, self.step, optimizer, (8, 8), images, CPU)


def test_batch_that_fits_is_reported_with_an_estimate_of_the_largest(monkeypatch):
    machine = Machine(monkeypatch, has=20.5)
    assert "4 images of 8×8 with 25 objects each take 9.00 of 20.5 GiB at most on cpu" in machine.preflight(4)
    assert machine.preflight(4).endswith("estimated from 1 and 4 images: up to 9 fit")
    assert machine.preflight(1).endswith("estimated from 1 and 2 images: up to 9 fit")
    assert Machine(monkeypatch, has=4).preflight(1).endswith("2 images do not fit")
    unknown = Machine(monkeypatch, has=None)
    assert unknown.preflight(4).endswith(
        "take 9.00 GiB at most on cpu, AdamW's moments 0.00 GiB more; this system does not report how much there is"
    )
    assert unknown.tried == [4]


def test_too_large_a_batch_is_not_run_on_a_cpu_and_the_largest_that_fits_is_named(monkeypatch):
    """The system would end the process, so the prediction decides."""
    machine = Machine(monkeypatch, has=20.5)
    with pytest.raises(
        ValueError,
        match=r"16 images of 8×8 with 25 objects each do not fit into the 20\.5 GiB of cpu: they need 33\.00 GiB "
        r"\(estimated from smaller batches\); an estimated 9 fit\. With checkpoint_activations 16 "
        r"images need 16\.50 GiB \(estimated from smaller batches\) and fit\. Lower batch_size",
    ):
        machine.preflight(16)
    assert max(machine.tried) == 4, "nothing runs that needs more than half of the memory"
    assert not machine.model.recomputes
    assert not machine.model.transformer.encoder.recomputes


def test_prediction_is_not_misled_by_what_is_allocated_once(monkeypatch):
    """The second image seems to need 1 GiB, all others need 1 MiB."""
    machine = Machine(monkeypatch, has=8)

    def step(batch):
        machine.tried.append(len(batch))
        machine.peak = (len(batch) > 1) * GIB + len(batch) * 2**20
        return machine.model.class_embed.weight.sum()

    machine.step = step
    assert "512 images of 8×8 with 25 objects each take 1.50 of 8.0 GiB" in machine.preflight(512)


def test_exhausted_memory_is_handled_and_other_errors_are_not(monkeypatch):
    machine = Machine(monkeypatch, has=2)
    with pytest.raises(ValueError, match=r"they need more; not even one fits\. With checkpoint_activations 2 images"):
        machine.preflight(2)
    machine.model.checkpoint_activations()
    with pytest.raises(ValueError, match=r"they need more; 1 take 1\.50 GiB and fit\. Lower batch_size"):
        machine.preflight(2)
    assert machine.model.recomputes
    assert memory.is_exhausted(RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"))
    machine.step = lambda batch: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        machine.preflight(2)


@given(st.integers(1, 5000), st.data())
def test_search_for_the_largest_batch_is_right_and_short(size, data):
    most = data.draw(st.integers(0, size - 1))
    tried = []
    low, high = largest(lambda images: tried.append(images) or images <= most, size)
    assert low <= most < high
    assert high == low + 1 or len(tried) >= MOST_TRIALS - 1
    assert len(tried) <= max(MOST_TRIALS, size.bit_length())


PROGRAM = """
import os, sys
if len(sys.argv) == 1:
    large = b"x" * (1 << 30)
    os.execv(sys.executable, [sys.executable, __file__, "again"])
import torch
from conddetr.engine import memory
device = torch.device("cpu")
for size in (256, 64):
    memory.reset_peak(device)
    torch.ones(size << 20, dtype=torch.uint8)
    print(memory.peak(device))
print(memory.limit(device))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets a process's peak")
def test_peak_of_this_process_can_be_reset(tmp_path):
    """256 MiB, then 64, in a process whose earlier program had 1 GiB."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=True)
    first, second, limit = map(int, done.stdout.split())
    assert 128 << 20 < first - second < 256 << 20
    assert 256 << 20 < first < min(1100 << 20, limit)


def test_container_limits_the_memory(monkeypatch, tmp_path):
    """Its free memory is its limit without its use, but files that are only cached count as free."""
    if memory.limit(CPU) is None:
        pytest.skip("this system does not report available memory")
    for name, text in {"limit": "max\n", "used": "5000\n", "memory.stat": "anon 9\n\ncached 2000\n"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", [(tmp_path, "limit", "used", "cached"), ("/absent", "a", "b", "c")])
    assert memory._free_in_container() == []
    (tmp_path / "limit").write_text("12000\n")
    assert memory._free_in_container() == [9000]
    own = memory._value(Path("/proc/self/status"), "VmRSS:") * 1024
    assert memory.limit(CPU) == pytest.approx(own + 9000, rel=0.1)


def test_max_targets_limits_the_objects_of_the_batch(tmp_path, capsys):
    small_trainer(tmp_path, preflight=True, max_targets=5)._preflight()
    assert "4 images of 64×64 with 5 objects each take" in capsys.readouterr().out


def test_moments_must_fit_in_memory_unless_they_exist_already(tmp_path, monkeypatch):
    run = small_trainer(tmp_path, preflight=True)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    monkeypatch.setattr(memory, "peak", lambda device: 1024 * 1000)
    monkeypatch.setattr(memory, "limit", lambda device: 1024 * 1000 + 8 * parameters)
    run._preflight()
    monkeypatch.setattr(memory, "limit", lambda device: 1024 * 1000 + 8 * parameters - 1)
    with pytest.raises(ValueError, match=r"4 images .* do not fit into the .* need more; not even one fits"):
        run._preflight()
    run.stepper(batches(run, 1), 0)
    run._preflight()


def test_memory_use_is_omitted_if_the_system_does_not_report_it(tmp_path, monkeypatch, capsys):
    """Windows has no module `resource`, and no `/proc`."""
    monkeypatch.setitem(sys.modules, "resource", None)
    importlib.reload(memory)
    monkeypatch.setattr(memory, "_STATUS", Path("/absent"))
    try:
        small_trainer(tmp_path, preflight=True)._preflight()
    finally:
        monkeypatch.undo()
        importlib.reload(memory)
    expected = "preflight: 4 images of 64×64 with 8 objects each fit in memory; this system does not report"
    assert expected in capsys.readouterr().out


def test_units_of_peak_memory_without_proc(monkeypatch):
    monkeypatch.setattr(memory, "_STATUS", Path("/absent"))
    resource = pytest.importorskip("resource", reason="only POSIX reports the memory of a process")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
    monkeypatch.setattr(sys, "platform", "linux")
    assert memory.peak(CPU) == 5 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.peak(CPU) == 5
