"""The interface of loggers: what they receive, in which order, and what happens if they fail."""

import sys

import pytest
from small_runs import finish, small_trainer, start, train_without_loggers

import conddetr
from conddetr.engine.log import read_log
from conddetr.interrupt import InterruptedRunError

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")


class Recorder:
    """Keeps its calls; raises an error in the methods named."""

    def __init__(self, *failing):
        self.calls, self.failing = [], failing

    def start(self, run, folder, first_epoch, resumed):
        self._note("start", run, folder, first_epoch, resumed)

    def log(self, record, epoch):
        self._note("log", record, epoch)

    def finish(self, error):
        self._note("finish", error)

    def _note(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.failing:
            raise OSError(f"{name} failed")

    def names(self):
        return [call[0] for call in self.calls]


def trainer_with(folder, *loggers, **options):
    run = small_trainer(folder, images=4, **options)
    run.loggers = list(loggers)
    return run


def test_loggers_receive_the_log_and_the_configuration(tmp_path):
    recorder = Recorder()
    detector = conddetr.Detector("conditional-detr-tiny", device="cpu", hidden_dim=16, num_heads=2, ffn_dim=32)
    options = {"batch_size": 4, "workers": 0, "eval_every": 1, "train_images": 4, "val_images": 1}
    detector.train(output_dir=str(tmp_path), epochs=2, loggers=[recorder], **options)
    (_, run, folder, first_epoch, resumed), *logged, last = recorder.calls
    assert (run, folder, first_epoch, resumed) == (detector.run, tmp_path, 0, False)
    records = read_log(tmp_path / "log.jsonl")
    defined = [{name: value for name, value in record.items() if value != -1} for record in records]
    # One image lacks objects of some sizes.
    assert defined != records
    assert logged == [("log", record, epoch) for epoch, record in enumerate(defined)]
    assert last == ("finish", None)
    assert run["log_to"] == ""


def test_failing_logger_is_closed_and_the_run_continues(tmp_path, caplog):
    bad, worse, good = Recorder("log", "finish"), Recorder("finish"), Recorder()
    trainer_with(tmp_path, bad, worse, good).fit()
    assert bad.names() == ["start", "log", "finish"]
    assert str(bad.calls[-1][1]) == "log failed"
    assert worse.names() == good.names() == ["start", "log", "log", "finish"]
    assert caplog.text.count("Logger Recorder: OSError: log failed. It is closed; training continues") == 1
    assert caplog.text.count("Logger Recorder: OSError: finish failed. It may lack the last records") == 1
    assert len(read_log(tmp_path / "log.jsonl")) == 2


def test_error_of_start_ends_the_run_before_the_first_step(tmp_path):
    first, failing = Recorder(), Recorder("start")
    with pytest.raises(OSError, match="start failed"):
        trainer_with(tmp_path, first, failing).fit()
    assert first.names() == ["start", "finish"]
    assert str(first.calls[-1][1]) == "start failed"
    assert failing.names() == ["start"]
    assert not list(tmp_path.glob("*"))


def test_interrupted_run_closes_its_loggers_and_resumes_them(tmp_path):
    recorder, second = Recorder(), Recorder()
    run = trainer_with(tmp_path, recorder)
    evaluate = run._evaluate
    run._evaluate = lambda request, writer: (
        run._interrupt(request, writer) if run.position.epoch else evaluate(request, writer)
    )
    with pytest.raises(InterruptedRunError):
        run.fit()
    assert recorder.names() == ["start", "log", "finish"]
    assert isinstance(recorder.calls[-1][1], InterruptedRunError)
    run = trainer_with(tmp_path, second)
    run.resume(tmp_path / "checkpoint.pt")
    run.fit()
    assert second.calls[0][3:] == (1, True)
    assert [call[2] for call in second.calls[1:-1]] == [1]


def test_missing_package_is_reported_before_training(tmp_path, monkeypatch):
    for name, package in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"conddetr.engine.loggers.{name}", raising=False)
        with pytest.raises(ImportError, match=rf"Logger {name} needs .*: pip install 'conddetr\[{name}\]'"):
            small_trainer(tmp_path, log_to=name)
    assert not list(tmp_path.iterdir())


def test_nothing_is_imported_unless_requested(tmp_path):
    finish(start(train_without_loggers, tmp_path))
