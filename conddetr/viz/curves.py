"""Learning curves of a training run as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path

from conddetr.viz.boxes import save_figure

_LOSSES = {"loss_ce": "class", "loss_bbox": "L1", "loss_giou": "GIoU"}
_METRICS = ("AP", "AP50", "AP75")


def draw_curves(records: Sequence[dict[str, float]], path: str | Path) -> Path:
    """Draw total loss, its parts in the last decoder layer, AP, and learning rate over epochs.

    Args:
        records: lines of `log.jsonl`.
        path: the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 2.8))
    # Fixed margins: an automatic layout would take several times as long as drawing.
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.17, top=0.9, wspace=0.24)
    total, parts, metrics, rate = figure.subplots(1, 4)
    epochs = [record["epoch"] + 1 for record in records]
    total.plot(epochs, [record["loss"] for record in records], color="black")
    total.set_title("loss")
    for name, label in _LOSSES.items():
        parts.plot(epochs, [record[name] for record in records], label=label)
    parts.set_title("losses of the last layer")
    evaluated = [record for record in records if "AP" in record]
    for name in _METRICS:
        # An undefined metric (-1) leaves a gap.
        values = [100 * record[name] if record[name] >= 0 else math.nan for record in evaluated]
        metrics.plot([record["epoch"] + 1 for record in evaluated], values, marker=".", label=name)
    metrics.set_title("percent")
    for name, label in (("lr", "transformer"), ("lr_backbone", "backbone")):
        rate.plot(epochs, [record[name] for record in records], label=label)
    rate.set_title("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (total, parts, metrics, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if axes is not total:
            axes.legend(frameon=False, fontsize="small")
    return save_figure(figure, path)
