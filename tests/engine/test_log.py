"""The local log, its curves, and the progress bar on a terminal."""

import io
import math
import sys

import pytest
from rich.console import Console

from conddetr.engine import progress
from conddetr.engine.log import RunLog, read_log
from conddetr.engine.loggers import Loggers
from conddetr.viz import curves

REST = {"loss_ce": 1.0, "loss_bbox": 0.5, "loss_giou": 0.25, "lr": 1e-4, "lr_backbone": 1e-5}


class Terminal(io.StringIO):
    """A text buffer that reports to be a terminal."""

    def isatty(self) -> bool:
        return True


def open_log(folder, epoch):
    return RunLog(folder, epoch, Loggers([], {}, folder, epoch, resumed=epoch > 0))


def test_log_of_a_resumed_run_drops_later_records_and_half_a_line(tmp_path):
    log = open_log(tmp_path, 0)
    for epoch, loss in enumerate([3.5, 2.5, 1.5]):
        log.write({"epoch": epoch, "loss": loss, **REST}, is_last=False)
    with open(log.file, "a") as file:
        file.write('{"epoch": 3, "lo')
    open_log(tmp_path, 2).write({"epoch": 2, "loss": 1.25, **REST}, is_last=True)
    assert [record["loss"] for record in read_log(tmp_path / "log.jsonl")] == [3.5, 2.5, 1.25]
    assert (tmp_path / "curves.png").is_file()


def test_curves_omit_undefined_metrics(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: figures.append(figure))
    log = open_log(tmp_path, 0)
    for epoch, ap in enumerate([-1.0, 0.25]):
        log.write({"epoch": epoch, "loss": 1.0, **REST, "AP": ap, "AP50": 0.0, "AP75": -1.0}, is_last=epoch == 1)
    lines = {line.get_label(): line.get_ydata().tolist() for line in figures[-1].axes[2].get_lines()}
    assert math.isnan(lines["AP"][0])
    assert (lines["AP"][1], lines["AP50"]) == (25.0, [0.0, 0.0])
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
