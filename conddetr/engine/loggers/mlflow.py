"""MLflow; the package `mlflow-skinny` suffices. Its environment variables apply: `MLFLOW_TRACKING_URI`,
`MLFLOW_EXPERIMENT_NAME` and so on.
"""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conddetr.engine.loggers.sent import Sent
from conddetr.interrupt import InterruptedRunError

try:
    import mlflow
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException
except ImportError as error:
    raise ImportError("Logger mlflow needs mlflow-skinny or mlflow: pip install 'conddetr[mlflow]'.") from error

PARAMS_AT_ONCE = 100
"""MLflow's limit of parameters in a request."""


class MlflowLogger:
    """One value of each metric for each epoch, the configuration as parameters.

    A resumed run continues the same MLflow run, whose id is in `mlflow.json` in the run's folder. MLflow keeps both
    values of a step that is sent twice: an epoch that was sent is not sent again. Its parameters cannot change: options
    that a resumed run changes become tags of the same names.
    """

    def start(self, run: dict[str, Any], folder: Path, first_epoch: int, resumed: bool) -> None:
        """As in `RunLogger`.

        Raises:
            ValueError: the tracking store cannot be used; the message has MLflow's reason.
        """
        self._sent = Sent(folder / "mlflow.json", first_epoch, resumed)
        try:
            self._client = mlflow.MlflowClient()
            self._start(_options(run), folder.resolve().name)
        except MlflowException as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"Logger mlflow cannot use {mlflow.get_tracking_uri()} ({reason}). Set MLFLOW_TRACKING_URI to a "
                "server's address; a local database needs all of MLflow: pip install mlflow."
                f"{self._sent.advice()}"
            ) from error

    def _start(self, options: dict[str, str], name: str) -> None:
        if self._sent.run:
            self._client.update_run(self._sent.run, status="RUNNING")
            data = self._client.get_run(self._sent.run).data
            before = {**data.params, **data.tags}
            changed = {key: value for key, value in options.items() if before.get(key) != value}
            self._client.log_batch(self._sent.run, tags=[RunTag(key, value) for key, value in changed.items()])
            return
        run = self._client.create_run(self._experiment(), run_name=name).info.run_id
        params = [Param(key, value) for key, value in options.items()]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(run, params=params[first : first + PARAMS_AT_ONCE])
        self._sent.begin(run)

    def _experiment(self) -> str:
        """Id of the experiment that MLflow's environment variables name; default: `conddetr`."""
        if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return number
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "conddetr")
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)

    def log(self, record: dict[str, float], epoch: int) -> None:
        """As in `RunLogger`."""
        if not self._sent.is_new(epoch):
            return
        now = int(1000 * time.time())
        # MLflow accepts no other characters, such as the * of a pattern.
        metrics = [Metric(re.sub(r"[^\w/. :-]", "_", name), value, now, epoch) for name, value in record.items()]
        self._client.log_batch(self._sent.run, metrics=metrics)
        self._sent.done(epoch)

    def finish(self, error: BaseException | None) -> None:
        """As in `RunLogger`."""
        interrupted = isinstance(error, (InterruptedRunError, KeyboardInterrupt))
        status = "FINISHED" if error is None else "KILLED" if interrupted else "FAILED"
        self._client.set_terminated(self._sent.run, status)


def _options(run: Mapping[str, Any]) -> dict[str, str]:
    """Options as text, by name; an option of a section is named `section.name`."""
    options: dict[str, str] = {}
    for key, value in run.items():
        inner = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, Mapping) else {key: value}
        options.update({name: str(item) for name, item in inner.items()})
    return options
