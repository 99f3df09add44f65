"""Weights & Biases. Its environment variables apply: `WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_MODE` and so on."""

import os
from pathlib import Path
from typing import Any

from conddetr.engine.loggers.sent import Sent

try:
    import wandb
except ImportError as error:
    raise ImportError("Logger wandb needs wandb: pip install 'conddetr[wandb]'.") from error


class WandbLogger:
    """One row of the history for each epoch; its step is the epoch.

    A resumed run continues the same W&B run, whose id is in `wandb.json` in the run's folder. W&B cannot overwrite
    rows: an epoch that was sent is not sent again.
    """

    def start(self, run: dict[str, Any], folder: Path, first_epoch: int, resumed: bool) -> None:
        """As in `RunLogger`.

        Raises:
            ValueError: W&B cannot be reached, or nobody is logged in; the message has W&B's reason.
        """
        self._sent = Sent(folder / "wandb.json", first_epoch, resumed)
        try:
            self._run = self._init(run, folder)
        except wandb.errors.Error as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"Logger wandb cannot start ({reason}). Log in with `wandb login`, or set WANDB_MODE=offline."
                f"{self._sent.advice()}"
            ) from error
        self._sent.begin(self._run.id)

    def _init(self, run: dict[str, Any], folder: Path) -> wandb.Run:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "conddetr"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            id=self._sent.run or None,
            resume="allow",
            config=run,
            # Beside a run that the caller has open, and without capturing what is printed.
            reinit="create_new",
            settings=wandb.Settings(console="off"),
        )

    def log(self, record: dict[str, float], epoch: int) -> None:
        """As in `RunLogger`."""
        if self._sent.is_new(epoch):
            # Committed, or W&B would wait for the next epoch before it keeps the row.
            self._run.log(record, step=epoch, commit=True)
            self._sent.done(epoch)

    def finish(self, error: BaseException | None) -> None:
        """As in `RunLogger`; waits until everything is sent."""
        self._run.finish(exit_code=0 if error is None else 1)
