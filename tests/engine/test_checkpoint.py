"""Checkpoints: whole or not at all, and no code inside."""

import argparse
import pickle

import pytest
import torch

from conddetr.engine.checkpoint import read_checkpoint, save_checkpoint


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
