"""The loggers that a run requests by name. Their packages are imported here, and only those."""

from conddetr.config.lists import entries
from conddetr.engine.loggers.interface import RunLogger


def make_loggers(log_to: str) -> list[RunLogger]:
    """The requested loggers, not yet started.

    Args:
        log_to: `RunConfig.log_to`.

    Raises:
        ImportError: a package is not installed; the message has the command.
    """
    return [_make(name) for name in entries("Run option log_to", log_to)]


def _make(name: str) -> RunLogger:
    if name == "tensorboard":
        from conddetr.engine.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger()
    if name == "wandb":
        from conddetr.engine.loggers.wandb import WandbLogger

        return WandbLogger()
    from conddetr.engine.loggers.mlflow import MlflowLogger

    return MlflowLogger()
