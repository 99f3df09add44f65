"""Checkpoints are written atomically and hold no code."""

import argparse
import os
import pickle
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import assert_equal

from conddetr.engine.checkpoint import (
    LATEST,
    PREVIOUS,
    CheckpointWriter,
    Packed,
    read_checkpoint,
    save_checkpoint,
    save_latest,
    save_weights,
)


def test_round_trip(tmp_path):
    content = {"model": {"weight": torch.randn(3)}, "epoch": 4, "classes": [{"id": 1, "name": "cat"}]}
    save_checkpoint(tmp_path / "new" / "a.pt", content)
    loaded = read_checkpoint(tmp_path / "new" / "a.pt")
    assert torch.equal(loaded["model"]["weight"], content["model"]["weight"])
    assert (loaded["epoch"], loaded["classes"]) == (4, content["classes"])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.pt"]


def test_content_of_every_type_survives_a_round_trip(tmp_path):
    shared = torch.randn(4, 6)
    content = {
        "model": {"a.b": shared.t(), "empty": torch.zeros(0, 3), "half": torch.randn(5).bfloat16()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 7: {}},
            "param_groups": [{"params": [0, 7], "lr": 0.1}],
        },
        "sums": [torch.ones(2, dtype=torch.float64), torch.arange(3)],
        "flags": torch.tensor([True, False]),
        "nothing": None,
        "ema": {},
        "names": [],
        "nan": [torch.tensor(float("nan"))],
    }
    Packed(content).write(tmp_path / "a.pt")
    loaded = read_checkpoint(tmp_path / "a.pt")
    assert loaded.pop("nan")[0].isnan()
    del content["nan"]
    assert_equal(loaded, content)
    assert loaded["model"]["half"].dtype == torch.bfloat16
    assert loaded["sums"][0].dtype == torch.float64
    # No tensor keeps the memory of the others.
    assert loaded["flags"].untyped_storage().nbytes() == 2


def test_torch_alone_reads_a_packed_file(tmp_path):
    Packed({"model": {str(number): torch.zeros(2) for number in range(100)}}).write(tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["tensors"]["float32"].shape == (200,)


def test_error_names_an_unknown_format(tmp_path):
    torch.save({"format": "conddetr checkpoint 9"}, tmp_path / "later.pt")
    with pytest.raises(
        ValueError, match=r"later\.pt: expected format 'conddetr checkpoint 2', got 'conddetr checkpoint 9'"
    ):
        read_checkpoint(tmp_path / "later.pt")


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        save_checkpoint(path, {"epoch": 2, "bad": lambda: None})
    assert read_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_official_namespaces_are_read(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(dilation=True)}, tmp_path / "official.pth")
    assert read_checkpoint(tmp_path / "official.pth")["args"].dilation is True


@pytest.mark.parametrize("is_zip", [True, False])
def test_plain_data_of_libraries_is_read(tmp_path, is_zip, monkeypatch):
    module = types.ModuleType("lightning.fabric.utilities.data")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    # Pickle needs the module for writing; a file of Lightning is read without Lightning.
    for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    content = {
        "ap": np.float64(0.4),
        "best": np.float32(0.25),
        "epoch": np.int64(7),
        "done": np.bool_(True),
        "ids": np.array([[3, 1], [2, 9]], np.int16),
        "names": np.array(["a", None], object),
        "dtype": np.dtype("float16"),
        "folder": Path("runs/a"),
        "hyper_parameters": module.AttributeDict(lr=0.1),
    }
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=is_zip)
    loaded = read_checkpoint(tmp_path / "a.ckpt")
    assert all(type(loaded[key]) is type(content[key]) for key in ("ap", "best", "epoch", "done", "ids", "dtype"))
    assert [loaded[key] for key in ("ap", "best", "epoch", "done")] == [0.4, 0.25, 7, True]
    assert loaded["ids"].tolist() == [[3, 1], [2, 9]]
    assert loaded["names"].tolist() == ["a", None]
    assert loaded["dtype"] == np.float16
    assert loaded["folder"].parts == ("runs", "a")
    assert loaded["hyper_parameters"] == {"lr": 0.1}


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


class System:
    def __reduce__(self):
        return (os.system, ("echo this must never run",))


@pytest.mark.parametrize(
    ("value", "name"),
    [(Code(), "print"), (System(), r"posix\.system"), (torch.nn.ReLU(), r"torch\.nn\.modules\.activation\.ReLU")],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_code_is_refused_and_named(tmp_path, capfd, value, name, is_zip):
    torch.save({"model": value}, tmp_path / "evil.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=rf"^Checkpoint .*evil\.pt cannot be read: .* it holds {name}, which"):
        read_checkpoint(tmp_path / "evil.pt")
    assert "never run" not in capfd.readouterr().out


@pytest.mark.parametrize("keep", [0, 10, 100, 400])
@pytest.mark.parametrize("is_packed", [False, True])
def test_error_names_a_damaged_file(tmp_path, keep, is_packed):
    path, content = tmp_path / "cut.pt", {"model": {"weight": torch.randn(30)}}
    if is_packed:
        Packed(content).write(path)
    else:
        save_checkpoint(path, content)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.pt cannot be read: damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_flipped_bit_is_harmless_or_reported(tmp_path, flip):
    path = tmp_path / "a.pt"
    plain = {"position": {"epoch": 3}, "optimizer": {"param_groups": [{"params": [0], "lr": 0.1}]}}
    content = {"model": {"weight": torch.randn(200), "count": torch.arange(5)}, **plain}
    Packed(content).write(path)
    whole = path.read_bytes()
    start = whole.index(content["model"]["weight"].numpy().tobytes())
    regions = {"weights": range(start, start + 800, 7), "plain": range(whole.index(b"position"), start, 5)}
    for region, offsets in regions.items():
        errors = []
        for offset in offsets:
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ flip]) + whole[offset + 1 :])
            try:
                assert_equal(read_checkpoint(path), content)
            except ValueError as error:
                errors.append(str(error))
        assert all("a.pt cannot be read: damaged" in error for error in errors)
        # Between the file's records is padding that is never read.
        assert len(errors) == len(offsets) if region == "weights" else len(errors) > len(offsets) / 4


def test_error_names_a_missing_part(tmp_path):
    Packed({"model": {"weight": torch.randn(3)}}).write(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt")
    for absent in ("checksum", "plain", "layout", "tensors"):
        torch.save({key: value for key, value in content.items() if key != absent}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=rf"a\.pt cannot be read: damaged.*KeyError: '{absent}'"):
            read_checkpoint(tmp_path / "a.pt")


def test_error_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        read_checkpoint(tmp_path / "none.pt")


def test_writer_saves_the_state_at_the_time_of_the_call(tmp_path):
    """Weights change while the file is written, and again before the next file."""
    weight, release = torch.zeros(1000), threading.Event()

    def slow(content):
        assert release.wait(10)
        save_latest(tmp_path, content)

    with CheckpointWriter() as writer:
        writer.submit(slow, {"weight": weight, "nested": [{"step": 1}, weight[:2]]})
        weight.fill_(1.0)
        release.set()
        writer.submit(slow, {"weight": weight, "nested": [{"step": 2}, weight[:2]]})
        weight.fill_(2.0)
    for name, value in ((PREVIOUS, 0.0), (LATEST, 1.0)):
        content = read_checkpoint(tmp_path / name)
        assert torch.equal(content["weight"], torch.full((1000,), value))
        assert content["nested"][0]["step"] == value + 1
        assert torch.equal(content["nested"][1], torch.full((2,), value))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority per thread")
def test_writer_thread_has_lower_priority_than_training():
    priorities = []
    with CheckpointWriter() as writer:
        writer.submit(lambda packed: priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())), {})
    # Not the lowest priority, 19: other programs would starve the thread, and training waits for it.
    own_priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert own_priority < priorities[0] < own_priority + 10 or own_priority == 19


def test_writer_raises_errors_of_its_jobs(tmp_path):
    def full(content):
        raise OSError("No space left on device")

    writer = CheckpointWriter()
    writer.submit(full, {"weight": torch.zeros(1)})
    with pytest.raises(OSError, match="No space left"):
        writer.submit(full, {"weight": torch.zeros(1)})
    with pytest.raises(OSError, match="No space left"), CheckpointWriter() as writer:
        writer.submit(full, {"weight": torch.zeros(1)})


def test_safetensors_hold_weights_configuration_and_classes(tmp_path):
    content = {"model": {"a.b": torch.randn(3, 2).t()}, "config": {"dropout": 0.1}, "classes": [{"id": 1, "name": "ö"}]}
    save_weights(tmp_path / "a.safetensors", content)
    loaded = read_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(loaded["model"]["a.b"], content["model"]["a.b"])
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a.b"], content["model"]["a.b"])
    assert (loaded["config"], loaded["classes"]) == (content["config"], content["classes"])
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read: damaged"):
        read_checkpoint(tmp_path / "a.safetensors")
