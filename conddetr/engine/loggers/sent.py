"""What was sent to a service that cannot overwrite records, in a small file of the run's folder."""

import json
from pathlib import Path

from conddetr.engine.progress import say
from conddetr.files import read_text, write_text


class Sent:
    """The service's run and the number of epochs that were sent to it."""

    def __init__(self, file: Path, first_epoch: int, resumed: bool) -> None:
        """Read which run to continue.

        Args:
            file: named after the service, in the run's folder.
            first_epoch, resumed: as in `RunLogger.start`. If the service has more than one record of later epochs, the
                run went back: its records would not fit the old ones, and it gets a new run there.

        Raises:
            ValueError: the file is damaged.
        """
        self.file = file
        self.run = ""
        """The service's id of the run; empty: there is none yet."""
        self.epochs = 0
        if not (resumed and file.is_file()):
            return
        try:
            content = json.loads(read_text(file))
            run, epochs = str(content["run"]), int(content["epochs"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and a new {file.stem} run begins.") from error
        if epochs > first_epoch + 1:
            say(f"{file.stem} run {run} has {epochs} epochs and cannot go back to {first_epoch}: a new run begins.")
            return
        self.run, self.epochs = run, epochs

    def advice(self) -> str:
        """A sentence for errors of a run that is continued: how to begin another one; empty for a new run."""
        return f" To begin a new {self.file.stem} run, delete {self.file}." if self.run else ""

    def begin(self, run: str) -> None:
        """Note the service's id of the run."""
        self.run = run
        self._write()

    def is_new(self, epoch: int) -> bool:
        """Whether an epoch was not sent yet."""
        return epoch >= self.epochs

    def done(self, epoch: int) -> None:
        """Note that an epoch was sent."""
        self.epochs = epoch + 1
        self._write()

    def _write(self) -> None:
        write_text(self.file, json.dumps({"run": self.run, "epochs": self.epochs}) + "\n")
