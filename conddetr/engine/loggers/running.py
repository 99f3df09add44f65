"""The loggers of a run while it trains. One that fails does not end the run."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from conddetr.engine.coco_metrics import METRICS
from conddetr.engine.loggers.interface import RunLogger

log = logging.getLogger(__name__)


class Loggers:
    """A context manager that starts loggers, passes records on, and finishes them with the error that ends the run."""

    def __init__(
        self, loggers: Sequence[RunLogger], run: dict[str, Any], folder: Path, first_epoch: int, resumed: bool
    ) -> None:
        """Takes the loggers and the arguments of their `start`."""
        self._loggers = list(loggers)
        self._arguments = run, folder, first_epoch, resumed
        self._running: list[RunLogger] = []

    def __enter__(self) -> "Loggers":
        try:
            for logger in self._loggers:
                logger.start(*self._arguments)
                self._running.append(logger)
        except BaseException as error:
            self._finish(error)
            raise
        return self

    def log(self, record: dict[str, float], epoch: int) -> None:
        """Send a record, without undefined metrics: -1 would look like a drop in a curve."""
        defined = {name: value for name, value in record.items() if name not in METRICS or value >= 0}
        for logger in list(self._running):
            try:
                logger.log(dict(defined), epoch)
            # Any error: the code of a logger is not ours, and the local log is complete without it.
            except Exception as error:
                self._running.remove(logger)
                _warn(logger, error, "It is closed; training continues, and log.jsonl has all records.")
                with contextlib.suppress(Exception):
                    logger.finish(error)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(value)

    def _finish(self, error: BaseException | None) -> None:
        while self._running:
            logger = self._running.pop()
            try:
                logger.finish(error)
            except Exception as other:
                _warn(logger, other, "It may lack the last records; log.jsonl has all.")


def _warn(logger: RunLogger, error: Exception, consequence: str) -> None:
    log.warning("Logger %s: %s: %s. %s", type(logger).__name__, type(error).__name__, error, consequence)
