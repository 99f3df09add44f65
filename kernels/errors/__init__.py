"""What of a batch's predictions is wrong, for the log."""

from conddetr.kernels.errors.op import prediction_errors

__all__ = ["prediction_errors"]
