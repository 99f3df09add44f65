"""The lines that a training run prints."""

from collections.abc import Mapping

import torch

from conddetr.capture import MAX_GRAPHS
from conddetr.engine.graphs import StepGraphs
from conddetr.engine.tables import percent

SLOW_LOADING = 0.1
"""Share of an epoch's time for loading images, from which on the epoch's line says it."""


def graphs_line(graphs: StepGraphs | None, why_none: str | None, shapes: int, device: torch.device) -> str:
    """One line that says whether steps are recorded; empty: graphs do not apply.

    Args:
        graphs: the graphs of the steps, if they are recorded.
        why_none: why they are not; empty: they are switched off.
        shapes: number of shapes in which batches come; 0: any.
        device: where the run trains.
    """
    reason = why_none if graphs is None else graphs.refused
    if reason:
        return f"without CUDA graphs: {reason}" if device.type == "cuda" else ""
    if graphs is None:
        return ""
    known = f"batches come in {shapes} shape{'s' * (shapes > 1)}" if shapes else "batches come in any shape"
    return f"CUDA graphs: {known}, each is recorded when it first occurs, at most {MAX_GRAPHS}"


def bar_note(means: Mapping[str, float], skipped: int, device: torch.device) -> str:
    """Note of the progress bar: mean losses so far, skipped steps and peak memory."""
    shown = {"loss": "loss", "class": "loss_ce", "L1": "loss_bbox", "GIoU": "loss_giou"}
    parts = [f"{title} {means[name]:.3f}" for title, name in shown.items() if name in means]
    if skipped:
        parts.append(f"{skipped} skipped")
    if device.type == "cuda":
        parts.append(f"GPU peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    return "  ".join(parts)


def epoch_line(record: Mapping[str, float], epochs: int) -> str:
    """An epoch's record as one line; `epochs` is their number in the whole run."""
    line = f"epoch {record['epoch'] + 1}/{epochs}  loss {record['loss']:.3f}"
    line += f"  {record['images_per_second']:.1f} images/s  {record['seconds']:.0f} s so far"
    if record["loading_share"] >= SLOW_LOADING:
        line += f"  loading {record['loading_share']:.0%} of the time"
    if record.get("cuda_graphs"):
        line += f"  {record['cuda_graphs']} CUDA graphs, {record['cuda_graphs_gib']:.2f} GiB"
    if "AP" in record:
        line += f"  AP {percent(record['AP'])}  AP50 {percent(record['AP50'])}"
    return line
