"""Loggers beside `log.jsonl`: TensorBoard, W&B, MLflow, and any object with the methods of `RunLogger`."""

from conddetr.engine.loggers.interface import RunLogger
from conddetr.engine.loggers.make import make_loggers
from conddetr.engine.loggers.running import Loggers

__all__ = ["Loggers", "RunLogger", "make_loggers"]
