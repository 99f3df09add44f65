"""Files are written whole or not at all, with the mode of any new file; a full disk is a one-line error."""

import os
import stat

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from small_runs import small_trainer

from conddetr.engine.checkpoint import (
    CheckpointWriter,
    Packed,
    read_checkpoint,
    save_checkpoint,
    save_run,
    save_weights,
)
from conddetr.engine.coco_metrics import Detections
from conddetr.engine.log import RunLog
from conddetr.engine.loggers.running import Loggers
from conddetr.export.files import Interface, save_torch
from conddetr.files import atomic_file, write_text
from conddetr.viz.boxes import save_figure

CONTENT = {"model": {"weight": torch.zeros(50_000)}, "config": {}, "classes": []}
"""A checkpoint with more bytes than `full_disk` allows."""


@pytest.fixture
def full_disk():
    """Limits files to 50 kB: writing fails in the middle, as on a disk that fills up."""
    resource = pytest.importorskip("resource", reason="only POSIX limits the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_detections(path):
    count = 2000
    zeros = np.zeros(count, np.int64)
    Detections(zeros, zeros, np.zeros((count, 4), np.float32), np.zeros(count, np.float32)).write(path)


def write_picture(path):
    figure = Figure(figsize=(6, 6))
    figure.add_axes((0, 0, 1, 1)).imshow(np.random.default_rng(0).random((300, 300)))
    save_figure(figure, path)


WRITERS = {
    "a.pt": lambda path: save_checkpoint(path, CONTENT),
    "packed.pt": lambda path: write_packed(path),
    "a.safetensors": lambda path: save_weights(path, CONTENT),
    "results.json": write_detections,
    "config.json": lambda path: write_text(path, "x" * 100_000),
    "a.png": write_picture,
    "a.pt2": lambda path: write_program(path),
}


def write_program(path):
    program = torch.export.export(torch.nn.Linear(200, 200), (torch.zeros(1, 200),))
    with atomic_file(path) as partial:
        save_torch(program, partial, Interface({}, ()), "{}")


def write_packed(path):
    with atomic_file(path) as partial:
        Packed(CONTENT).write(partial)


@pytest.mark.parametrize("name", WRITERS)
def test_error_of_a_full_disk_names_the_file_and_the_old_file_stays(tmp_path, full_disk, name):
    path = tmp_path / name
    path.write_bytes(b"before")
    full_disk()
    expected = rf"^\S*{name} could not be written: .+\. Its old content is kept\. [\d,]+ MiB are free there"
    with pytest.raises(OSError, match=expected) as raised:
        WRITERS[name](path)
    assert len(str(raised.value).splitlines()) == 1
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_full_disk_in_the_writer_thread_keeps_the_old_checkpoint(tmp_path, full_disk):
    def save(value):
        with CheckpointWriter() as writer:
            content = {**CONTENT, "ema": {}, "metrics": {}, "run": {}, "value": value}
            writer.submit(lambda packed: save_run(tmp_path, packed, epoch=1, is_best=False, keep=False), content)

    save(1)
    full_disk()
    with pytest.raises(OSError, match=r"checkpoint\.safetensors could not be written: .* is kept"):
        save(2)
    assert read_checkpoint(tmp_path / "checkpoint.pt")["value"] == 1


def test_error_names_a_log_that_cannot_be_written(tmp_path, full_disk):
    record = {"epoch": 0, "note": "x" * 60_000}
    log = RunLog(tmp_path, 0, Loggers([], {}, tmp_path, 0, resumed=False))
    full_disk()
    with pytest.raises(OSError, match=r"log\.jsonl could not be written: File too large\. Its old content"):
        log.write(record, is_last=True)


def test_other_errors_are_not_changed(tmp_path):
    for error in (RuntimeError("CUDA error"), ValueError("x"), OSError("a line of its own")):
        with pytest.raises(type(error)) as raised, atomic_file(tmp_path / "a"):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_written_files_have_the_mode_of_new_files(tmp_path, name, mask):
    before = os.umask(mask)
    try:
        # The mode of a partial file that a killed process left has no influence.
        (tmp_path / f"{name}.partial").touch(mode=0o600)
        WRITERS[name](tmp_path / name)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


def test_writing_works_if_folders_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows, which also flushes only files that were opened for writing."""
    system_open, flushed = os.open, []

    def windows_open(path, flags, *mode):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return system_open(path, flags, *mode)

    def windows_fsync(descriptor):
        import fcntl

        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        flushed.append(descriptor)

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_fsync)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert len(flushed) == 1


def test_error_of_training_on_a_full_disk_names_the_file(tmp_path, full_disk):
    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
    trainer = small_trainer(tmp_path, images=8, epochs=1)
    full_disk()
    with pytest.raises(OSError, match=r"checkpoint\.pt could not be written: PyTorch's writer stopped"):
        trainer.fit()
