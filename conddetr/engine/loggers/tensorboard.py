"""TensorBoard: events in the run's folder."""

from pathlib import Path
from typing import Any

from conddetr.files import write_errors

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError("Logger tensorboard needs tensorboard: pip install 'conddetr[tensorboard]'.") from error

BOARD = "tensorboard"
"""Folder of the events."""


class TensorBoardLogger:
    """One scalar for each number of a record, over epochs. Records of a resumed run replace those of later epochs."""

    def start(self, run: dict[str, Any], folder: Path, first_epoch: int, resumed: bool) -> None:
        """As in `RunLogger`."""
        self._folder = folder / BOARD
        with write_errors(self._folder):
            self._board = SummaryWriter(str(self._folder), purge_step=first_epoch)

    def log(self, record: dict[str, float], epoch: int) -> None:
        """As in `RunLogger`; waits until the events are written."""
        with write_errors(self._folder):
            for name, value in record.items():
                self._board.add_scalar(name, value, epoch)
            self._board.flush()

    def finish(self, error: BaseException | None) -> None:
        """As in `RunLogger`."""
        with write_errors(self._folder):
            self._board.close()
