"""TensorBoard's events are the records of `log.jsonl`, read back with TensorBoard's own reader."""

import time

import pytest

from conddetr.engine.log import RunLog, read_log
from conddetr.engine.loggers import Loggers, make_loggers

reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="reads its events")

REST = {"loss_ce": 1.0, "loss_bbox": 0.5, "loss_giou": 0.25, "lr": 1e-4, "lr_backbone": 1e-5}


def write(folder, first_epoch, records):
    """Log records as a run that starts, or resumes, at `first_epoch`."""
    with Loggers(make_loggers("tensorboard"), {}, folder, first_epoch, first_epoch > 0) as loggers:
        log = RunLog(folder, first_epoch, loggers)
        for epoch, record in enumerate(records, first_epoch):
            log.write({"epoch": epoch, **REST, **record}, is_last=False)


def test_events_are_the_log_and_a_resumed_run_replaces_later_ones(tmp_path):
    write(tmp_path, 0, [{"loss": 3.5}, {"loss": 2.5, "lr_pattern/backbone.*": 0.5}, {"loss": 1.5}])
    # The names of TensorBoard's files have a resolution of one second, so files of one second have no order.
    second = int(time.time())
    while int(time.time()) == second:
        time.sleep(0.01)
    write(tmp_path, 2, [{"loss": 1.25}])
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 3.5), (1, 2.5), (2, 1.25)]
    assert [record["loss"] for record in read_log(tmp_path / "log.jsonl")] == [3.5, 2.5, 1.25]
    assert [event.value for event in events.Scalars("lr_pattern/backbone.*")] == [0.5]


def test_undefined_metrics_are_left_out(tmp_path):
    write(tmp_path, 0, [{"loss": 1.0, "AP": ap, "AP50": 0.0, "AP75": -1.0} for ap in (-1.0, 0.25)])
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("AP")] == [(1, 0.25)]
    assert "AP75" not in events.Tags()["scalars"]
