"""Dropout together with the operation beside it."""

from conddetr.kernels.relu_dropout.op import dropout_add, relu_dropout

__all__ = ["dropout_add", "relu_dropout"]
