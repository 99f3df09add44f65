"""COCO metrics as tables for the terminal, in percent."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from conddetr.engine.coco_metrics import ClassMetrics


def class_table(classes: list[ClassMetrics]) -> Table:
    """AP and recall of every class in percent, best first, as a table for the terminal."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("class")
    for name in ("objects", "AP", "AP50", "AP75", "AR100"):
        table.add_column(name, justify="right")
    for row in sorted(classes, key=lambda row: -row.ap):
        values = (row.ap, row.ap50, row.ap75, row.ar100)
        table.add_row(Text(row.name), str(row.objects), *(percent(value) for value in values))
    return table


def metrics_table(metrics: dict[str, float]) -> Table:
    """COCO's twelve metrics in percent, as a table for the terminal."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in metrics:
        table.add_column(name, justify="right")
    table.add_row(*(percent(value) for value in metrics.values()))
    return table


def percent(value: float) -> str:
    """A metric in [0, 1] as percent, e.g. `61.1`; a dash if it is undefined, which is -1 in COCO's metrics."""
    return f"{100 * value:.1f}" if value >= 0 else "–"
