"""Logs of a run: `log.jsonl`, `curves.png`, and TensorBoard events if TensorBoard is installed."""

import contextlib
import importlib.util
import json
import os
import time
from pathlib import Path

from conddetr.engine.coco_metrics import METRICS
from conddetr.files import write_errors, write_text

BOARD = "tensorboard"
"""Folder of TensorBoard's events."""
DRAWING_SHARE = 0.05
"""Largest share of the time that drawing curves may take: they are drawn again only after enough time has passed."""


class RunLog:
    """The records of a run, one per epoch."""

    def __init__(self, folder: Path, epoch: int) -> None:
        """Open the log of a run that continues at `epoch`; drops later records and incomplete lines of a killed run."""
        self.folder, self.file = folder, folder / "log.jsonl"
        self.records = [record for record in read_log(self.file) if record["epoch"] < epoch]
        write_text(self.file, "".join(json.dumps(record) + "\n" for record in self.records))
        self._board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            with write_errors(folder / BOARD):
                self._board = SummaryWriter(str(folder / BOARD), purge_step=epoch)
        self._draw_after = 0.0

    def write(self, record: dict[str, float], is_last: bool) -> None:
        """Add an epoch's record and wait until it is on disk. Draws curves if they are due."""
        self.records.append(record)
        with write_errors(self.file), open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._board is not None:
            with write_errors(self.folder / BOARD):
                for name, value in record.items():
                    if name in METRICS and value < 0:
                        # An undefined metric: -1 would look like a drop in the curve.
                        continue
                    self._board.add_scalar(name, value, record["epoch"])
                self._board.flush()
        start = time.perf_counter()
        if is_last or start >= self._draw_after:
            # Here, not above: matplotlib takes half a second to import.
            from conddetr.viz.curves import draw_curves

            draw_curves(self.records, self.folder / "curves.png")
            end = time.perf_counter()
            self._draw_after = end + (end - start) / DRAWING_SHARE

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            with write_errors(self.folder / BOARD):
                self._board.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a `log.jsonl`, without incomplete lines; an empty list if there is no file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records
