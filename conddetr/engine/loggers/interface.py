"""The interface of a logger."""

from pathlib import Path
from typing import Any, Protocol


class RunLogger(Protocol):
    """Receives the records of a run, in its first process only. Any object with these methods is one.

    An error in `start` ends the run before its first step. An error in another method closes this logger, with a
    warning, and the run continues.
    """

    def start(self, run: dict[str, Any], folder: Path, first_epoch: int, resumed: bool) -> None:
        """Called once, before the first step.

        Args:
            run: the whole configuration, as `RunConfig.to_dict`: plain values, by section.
            folder: the run's folder, which exists.
            first_epoch: number of the epoch whose record comes first, from 0. A resumed run may send the last record
                again: it was killed after the record and before the checkpoint.
            resumed: whether the run continues an earlier one, perhaps inside its first epoch.
        """

    def log(self, record: dict[str, float], epoch: int) -> None:
        """Called after each epoch.

        Args:
            record: as in `log.jsonl`, numbers by name, without metrics that are undefined.
            epoch: number of the epoch, from 0.
        """

    def finish(self, error: BaseException | None) -> None:
        """Called once at the end, if `start` was successful.

        Args:
            error: the exception that ends the run, `InterruptedRunError` after a signal, or this logger's own; None:
                the run is complete.
        """
