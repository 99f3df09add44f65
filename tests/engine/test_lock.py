"""Only one run uses a folder at a time, and the folder is free again when the run ends, even if it is killed."""

import errno
import fcntl
import os
import signal
import socket
import time

import pytest
from small_runs import LIMIT, command_line, counter, hold_folder, start, start_ranks

from conddetr.cli import main
from conddetr.engine.lock import LOCK, sole_run


def start_holder(folder):
    """A process that holds the folder, and the id of its worker process."""
    worker = counter()
    process = start(hold_folder, folder, worker)
    while process.is_alive() and worker.value == 0:
        time.sleep(0.01)
    return process, worker.value


def test_folder_is_free_after_its_holder_is_killed_even_if_a_worker_lives(tmp_path):
    process, worker = start_holder(tmp_path / "run")
    try:
        with pytest.raises(FileExistsError) as refused, sole_run(tmp_path / "run"):
            pass
        text = f"{tmp_path / 'run'} is in use by process {process.pid} on {socket.gethostname()}, since 2"
        assert str(refused.value).startswith(text)
        process.kill()
        process.join(LIMIT)
        os.kill(worker, 0)
        with sole_run(tmp_path / "run"):
            assert f"process {os.getpid()} on" in (tmp_path / "run" / LOCK).read_text()
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)


def test_all_ranks_are_refused(tmp_path):
    process, worker = start_holder(tmp_path / "run")
    command = ["train", "--device", "cpu", "--train-images", "8", "--workers", "0", "--out", str(tmp_path / "run")]
    try:
        for rank in start_ranks(2, command_line, tmp_path, command):
            rank.join(LIMIT)
            assert rank.exitcode == 2
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)
    assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]


def test_second_run_of_a_process_is_refused_and_the_first_keeps_the_lock(tmp_path):
    (tmp_path / "other").symlink_to(tmp_path / "run")
    with sole_run(tmp_path / "run"):
        for name in ("run", "other"):
            with pytest.raises(FileExistsError, match=f"in use by another run of this process \\({os.getpid()}\\)"):
                sole_run(tmp_path / name).__enter__()
        # For another process it is still locked.
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                descriptor = os.open(tmp_path / "run" / LOCK, os.O_RDWR)
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(writer, b"free")
            except OSError as error:
                os.write(writer, error.strerror.encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reader, 100).decode() == os.strerror(errno.EAGAIN)
    # No run started, and no folder is left.
    assert not (tmp_path / "run").exists()
    with sole_run(tmp_path / "run"):
        pass


def test_warning_for_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with sole_run(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: the file system has no locks, so a second run there would not be refused."
    ]


def test_unusable_folder_is_a_one_line_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / LOCK).mkdir(parents=True)
    for name, reason in (("file", "File exists"), ("folder", "Is a directory")):
        out = tmp_path / name
        assert main(["train", "--device", "cpu", "--train-images", "8", "--out", str(out)]) == 2
        expected = f"conddetr train: {out} cannot hold a run: {reason}. Name another folder.\n"
        assert capsys.readouterr().err == expected
