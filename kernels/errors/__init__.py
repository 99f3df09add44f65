"""Errors of a batch's predictions, for the log."""

from conddetr.kernels.errors.op import prediction_errors

__all__ = ["prediction_errors"]
