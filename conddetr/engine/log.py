"""The local log of a run: `log.jsonl` and `curves.png`."""

import contextlib
import json
import os
import time
from pathlib import Path

from conddetr.engine.loggers import Loggers
from conddetr.files import write_errors, write_text

DRAWING_SHARE = 0.05
"""Largest share of the time that drawing curves may take: they are drawn again only after enough time has passed."""


class RunLog:
    """The records of a run, one per epoch."""

    def __init__(self, folder: Path, epoch: int, loggers: Loggers) -> None:
        """Open the log of a run that continues at `epoch`; drops later records and incomplete lines of a killed run.

        Args:
            folder: the run's folder.
            epoch: number of the next epoch, from 0.
            loggers: receive the records too.
        """
        self.folder, self.file, self._loggers = folder, folder / "log.jsonl", loggers
        self.records = [record for record in read_log(self.file) if record["epoch"] < epoch]
        write_text(self.file, "".join(json.dumps(record) + "\n" for record in self.records))
        self._draw_after = 0.0

    def write(self, record: dict[str, float], is_last: bool) -> None:
        """Add an epoch's record, wait until it is on disk, and send it to the loggers. Draws curves if they are due."""
        self.records.append(record)
        with write_errors(self.file), open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._loggers.log(record, int(record["epoch"]))
        start = time.perf_counter()
        if is_last or start >= self._draw_after:
            # Here, not above: matplotlib takes half a second to import.
            from conddetr.viz.curves import draw_curves

            draw_curves(self.records, self.folder / "curves.png")
            end = time.perf_counter()
            self._draw_after = end + (end - start) / DRAWING_SHARE


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a `log.jsonl`, without incomplete lines; an empty list if there is no file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records
