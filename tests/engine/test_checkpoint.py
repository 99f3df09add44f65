"""Checkpoints: whole or not at all, and no code inside."""

import argparse
import pickle
import threading

import pytest
import torch

from conddetr.engine.checkpoint import (
    LATEST,
    PREVIOUS,
    CheckpointWriter,
    read_checkpoint,
    save_checkpoint,
    save_latest,
    save_weights,
)


def test_round_trip(tmp_path):
    content = {"model": {"weight": torch.randn(3)}, "epoch": 4, "classes": [{"id": 1, "name": "cat"}]}
    save_checkpoint(tmp_path / "new" / "a.pt", content)
    found = read_checkpoint(tmp_path / "new" / "a.pt")
    assert torch.equal(found["model"]["weight"], content["model"]["weight"])
    assert (found["epoch"], found["classes"]) == (4, content["classes"])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        save_checkpoint(path, {"epoch": 2, "bad": lambda: None})
    assert read_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_official_namespaces_are_read(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(dilation=True)}, tmp_path / "official.pth")
    assert read_checkpoint(tmp_path / "official.pth")["args"].dilation is True


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_code_is_refused(tmp_path, capsys):
    torch.save({"model": Code()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt can not be read"):
        read_checkpoint(tmp_path / "evil.pt")
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 10, 100, 400])
def test_damaged_files_are_named(tmp_path, keep):
    path = tmp_path / "cut.pt"
    save_checkpoint(path, {"model": {"weight": torch.randn(30)}})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.pt can not be read: damaged"):
        read_checkpoint(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        read_checkpoint(tmp_path / "none.pt")


def test_the_writer_saves_what_was_true_when_asked(tmp_path):
    """Weights change while the file is written, and again before the next one."""
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


def test_errors_of_the_writer_are_raised(tmp_path):
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
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(found["model"]["a.b"], content["model"]["a.b"])
    assert (found["config"], found["classes"]) == (content["config"], content["classes"])
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"a\.safetensors can not be read: damaged"):
        read_checkpoint(tmp_path / "a.safetensors")
