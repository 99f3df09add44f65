"""Dropout before a residual sum."""

from conddetr.kernels.cpu.dropout.op import dropout_add

__all__ = ["dropout_add"]
