"""Whether worker processes can be started, how many, and which processes receive Ctrl-C."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types

import pytest
from small_runs import LIMIT

import conddetr
from conddetr import interrupt
from conddetr.cli import main
from conddetr.data.loader import make_loader
from conddetr.data.synthetic import SyntheticShapes
from conddetr.detector import Detector
from conddetr.processes import can_start_workers, cores, interrupts_held

pytestmark = pytest.mark.usefixtures("default_interrupt_handler")


@pytest.fixture
def start_method():
    """Sets the start method of new processes; restores the earlier one at the end."""
    before = multiprocessing.get_start_method(allow_none=True)
    yield lambda name: multiprocessing.set_start_method(name, force=True)
    multiprocessing.set_start_method(before, force=True)


def main_module(monkeypatch, file, spec=None):
    module = types.ModuleType("__main__")
    module.__spec__ = spec and types.SimpleNamespace(name=spec)
    if file:
        module.__file__ = str(file)
    monkeypatch.setitem(sys.modules, "__main__", module)


PLAIN = "import logging\nlog = logging.getLogger(__name__)\ndef f():\n    if __name__: pass\nf()\n"


@pytest.mark.parametrize(
    ("source", "spec", "method", "expected"),
    [
        (PLAIN, None, "spawn", False),
        (PLAIN, None, "forkserver", False),
        (PLAIN, "package.script", "spawn", False),
        (PLAIN, None, "fork", True),
        (PLAIN + 'if __name__ == "__main__":\n    f()\n', None, "spawn", True),
        (PLAIN + 'if "__main__" == __name__ and f():\n    f()\n', None, "forkserver", True),
        # `python -m conddetr` has no guard and needs none.
        (PLAIN, "conddetr.__main__", "spawn", True),
        # A program in one file with compiled code only; a notebook or `python -c`.
        ("\0", None, "spawn", True),
        (None, None, "spawn", True),
    ],
)
def test_workers_start_only_if_the_script_does_not_run_again(
    tmp_path, monkeypatch, caplog, start_method, source, spec, method, expected
):
    script = tmp_path / "script.py"
    if source is not None:
        script.write_text(source)
    main_module(monkeypatch, None if source is None else script, spec)
    start_method(method)
    assert [can_start_workers() for _ in range(2)] == [expected] * 2
    messages = [record.getMessage() for record in caplog.records]
    # One warning, which says what to write.
    assert len(messages) == (not expected)
    if messages:
        assert f"start method {method}) would run all of {script} again" in messages[0]
        assert 'under `if __name__ == "__main__":`' in messages[0]


def test_without_a_guard_images_are_loaded_in_this_process(tmp_path, monkeypatch, start_method, small_coco, capsys):
    (tmp_path / "script.py").write_text("run()\n")
    main_module(monkeypatch, tmp_path / "script.py")
    start_method("spawn")
    loader = make_loader(SyntheticShapes(4, 1, 64), 2, train=False, workers=2)
    assert loader.num_workers == 0
    assert [len(batch) for batch in loader] == [2, 2]
    for number in range(40):
        small_coco.annotate(100 + number % 4, [1.0, 2.0, 3.0 + number, 4.0], 7)
    small_coco.write()
    command = ["validate-data", "--images", str(small_coco.images), "--annotations", str(small_coco.file)]
    assert main([*command, "--processes", "2"]) == 0
    assert multiprocessing.active_children() == []


def test_number_of_cores_without_sched_getaffinity(monkeypatch):
    if hasattr(os, "sched_getaffinity"):
        assert cores() == len(os.sched_getaffinity(0))
        monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_do_not_receive_ctrl_c(start_method, method):
    start_method(method)
    with interrupts_held():
        process = multiprocessing.Process(target=time.sleep, args=(LIMIT,))
        process.start()
    os.kill(process.pid, signal.SIGINT)
    process.join(0.5)
    assert process.is_alive()
    # Unlike SIGTERM, which a fork of this process may handle, this ends any process.
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals between processes")
@pytest.mark.parametrize("command", [["-m", "conddetr"], ["conddetr"]])
def test_ctrl_c_during_the_import_of_pytorch_is_silent(tmp_path, command):
    # Replaces PyTorch, whose import takes seconds.
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    if command == ["conddetr"]:
        # The script that pip writes.
        command = [str(tmp_path / "conddetr")]
        (tmp_path / "conddetr").write_text("import sys\nfrom conddetr.cli import main\nsys.exit(main())\n")
    process = subprocess.Popen(
        [sys.executable, *command, "env"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=LIMIT) == ("", "")
    assert process.returncode == -signal.SIGINT


def test_importing_the_package_does_not_change_ctrl_c():
    assert not interrupt._ENDS_AT_ONCE


def test_ctrl_c_in_a_command_prints_one_line(tmp_path, monkeypatch, capsys):
    model = conddetr.build("conditional-detr-tiny", num_classes=3, image_size=64, max_image_size=64)
    classes = [{"id": number, "name": name} for number, name in enumerate(("disk", "square", "triangle"), 1)]
    file = Detector(model, classes, "cpu").save(tmp_path / "a.pt")
    load = SyntheticShapes.load

    def interrupted(self, index, plan):
        signal.raise_signal(signal.SIGINT)
        return load(self, index, plan)

    monkeypatch.setattr(SyntheticShapes, "load", interrupted)
    small = ["--val-images", "2", "--device", "cpu", "--workers", "0"]
    assert main(["eval", "--checkpoint", str(file), *small]) == 130
    assert capsys.readouterr().err == "conddetr eval: interrupted.\n"
    # Before the first step there is nothing to save.
    assert main(["train", "--train-images", "8", *small, "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "conddetr train: interrupted.\n"
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
