"""Preflight runs the largest batch and changes nothing."""

import copy
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from small_runs import batches, small_trainer

import conddetr
from conddetr.data.batch import make_loader
from conddetr.data.synthetic import SyntheticShapes
from conddetr.engine import preflight as module
from conddetr.engine.preflight import preflight

CPU = torch.device("cpu")


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
    assert seen == [(True, (2, 3, 128, 128), (25, 25))]
    assert line.startswith("preflight: 2 images of 128×128 with 25 objects each take ")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_error_for_too_little_memory_says_what_to_lower(monkeypatch):
    model = conddetr.build("conditional-detr-tiny", num_classes=3)

    def exhausted(batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "_total", lambda device: 80 * 2**30)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"64 images of 800×1333 .* do not fit into the 80\.0 GiB of cpu. Lower batch"):
        preflight(model, exhausted, optimizer, (800, 1333), 64, CPU)


def test_max_targets_limits_the_objects_of_the_batch(tmp_path, capsys):
    small_trainer(tmp_path, preflight=True, max_targets=5)._preflight()
    assert "4 images of 64×64 with 5 objects each take" in capsys.readouterr().out


def test_moments_must_fit_in_memory_unless_they_exist_already(tmp_path, monkeypatch):
    run = small_trainer(tmp_path, preflight=True)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    monkeypatch.setattr(module, "_peak_bytes", lambda: 1024 * 1000)
    monkeypatch.setattr(module, "_total", lambda device: 1024 * 1000 + 8 * parameters)
    run._preflight()
    monkeypatch.setattr(module, "_total", lambda device: 1024 * 1000 + 8 * parameters - 1)
    with pytest.raises(ValueError, match=r"4 images .*, and AdamW's moments, .* more, do not fit into the"):
        run._preflight()
    run.stepper(batches(run, 1), 0)
    run._preflight()


def test_memory_use_is_omitted_if_the_system_does_not_report_it(tmp_path, monkeypatch, capsys):
    """Windows has no module `resource`."""
    monkeypatch.setitem(sys.modules, "resource", None)
    importlib.reload(module)
    try:
        monkeypatch.setattr("conddetr.engine.trainer.preflight", module.preflight)
        small_trainer(tmp_path, preflight=True)._preflight()
    finally:
        monkeypatch.undo()
        importlib.reload(module)
    expected = "preflight: 4 images of 64×64 with 8 objects each fit in memory; this system does not report"
    assert expected in capsys.readouterr().out


def test_units_of_peak_memory_on_linux_and_macos(monkeypatch):
    resource = pytest.importorskip("resource", reason="only POSIX reports the memory of a process")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
    monkeypatch.setattr(sys, "platform", "linux")
    assert module._peak_bytes() == 5 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert module._peak_bytes() == 5
