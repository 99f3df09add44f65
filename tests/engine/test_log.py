"""TensorBoard events beside the log, and the progress bar on a terminal."""

import io
import math
import sys
import time

import pytest
from rich.console import Console

from conddetr.engine import progress
from conddetr.engine.log import RunLog, read_log
from conddetr.viz import curves


class Terminal(io.StringIO):
    """A text buffer that reports to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_tensorboard_has_the_same_values_as_the_log(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="reads its events")
    rest = {"loss_ce": 1.0, "loss_bbox": 0.5, "loss_giou": 0.25, "lr": 1e-4, "lr_backbone": 1e-5}
    log = RunLog(tmp_path, 0)
    for epoch, loss in enumerate([3.5, 2.5, 1.5]):
        log.write({"epoch": epoch, "loss": loss, **rest}, is_last=False)
    log.close()
    # The names of TensorBoard's files have a resolution of one second, so files of one second have no order.
    second = int(time.time())
    while int(time.time()) == second:
        time.sleep(0.01)
    # The run resumes at its last epoch, which gets another loss.
    log = RunLog(tmp_path, 2)
    log.write({"epoch": 2, "loss": 1.25, **rest}, is_last=True)
    log.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 3.5), (1, 2.5), (2, 1.25)]
    assert [record["loss"] for record in read_log(tmp_path / "log.jsonl")] == [3.5, 2.5, 1.25]
    assert (tmp_path / "curves.png").is_file()


def test_curves_omit_undefined_metrics(tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="reads its events")
    figures = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: figures.append(figure))
    rest = {"loss": 1.0, "loss_ce": 1.0, "loss_bbox": 0.5, "loss_giou": 0.25, "lr": 1e-4, "lr_backbone": 1e-5}
    log = RunLog(tmp_path, 0)
    for epoch, ap in enumerate([-1.0, 0.25]):
        log.write({"epoch": epoch, **rest, "AP": ap, "AP50": 0.0, "AP75": -1.0}, is_last=epoch == 1)
    log.close()
    lines = {line.get_label(): line.get_ydata().tolist() for line in figures[-1].axes[2].get_lines()}
    assert math.isnan(lines["AP"][0])
    assert (lines["AP"][1], lines["AP50"]) == (25.0, [0.0, 0.0])
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("AP")] == [(1, 0.25)]
    assert "AP75" not in events.Tags()["scalars"]
    # The log keeps COCO's -1.
    assert [record["AP"] for record in read_log(tmp_path / "log.jsonl")] == [-1.0, 0.25]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bar_is_shown_on_a_terminal_only(monkeypatch, is_terminal):
    output = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(progress, "console", Console(file=output, force_terminal=is_terminal, width=120))
    with progress.Progress("epoch 1/2", total=None) as bar:
        bar.advance(8, "loss 3.500", total=32)
        bar.advance(8, "loss 2.500")
        bar._bar.refresh()
    shown = output.getvalue()
    if not is_terminal:
        assert shown.strip() == ""
        return
    for part in ("epoch 1/2", "16/32", "50%", "images/s", "loss 2.500", "left"):
        assert part in shown
